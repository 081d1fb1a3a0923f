"""What only a GPU needs: dilated convolutions in the forms that cuDNN and cuBLAS are fast at."""
