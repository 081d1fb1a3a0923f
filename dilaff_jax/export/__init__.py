"""A trained network as one file that runs without this package.

python -m dilaff_jax.export WORKDIR FILE                                # StableHLO
python -m dilaff_jax.export.onnx WORKDIR FILE.onnx --size=512,512
python -m dilaff_jax.export.saved_model WORKDIR FOLDER                  # TensorFlow
"""
