"""Networks built in code, float or with fake quant as a TensorRT-style QAT export has it.

Weights are random (seeded, He-scaled), BatchNormalization statistics and activation ranges are measured on
smooth random images. The float twin of a fake-quant network has the same weights. Opset 17, symbolic batch.
"""

from __future__ import annotations

from qat2int8.pipelines.benchmarking.builder import Builder
from qat2int8.pipelines.benchmarking.sketch import INPUT, OUTPUT, Sketch

BRANCH = 0.3
"""Gamma at the end of a residual branch. Trained networks have it small; at 1 a deep random one is chaotic."""


@Builder
def resnet50(*, width: int = 64, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """ResNet-50 v1.5 (He et al. 2016): bottlenecks, stride in the 3x3 convolution."""
    net = Sketch("resnet50", size, seed)
    return _classify(net, _bottlenecks(net, width, (3, 4, 6, 3)), classes)


@Builder
def resnet101(*, width: int = 64, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """ResNet-101 v1.5: :func:`resnet50` with 23 blocks in the third stage."""
    net = Sketch("resnet101", size, seed)
    return _classify(net, _bottlenecks(net, width, (3, 4, 23, 3)), classes)


@Builder
def resnet18(
    *,
    width: int = 64,
    depth: tuple[int, ...] = (2, 2, 2, 2),
    size: int = 224,
    classes: int = 1000,
    small_stem: bool = False,
    seed: int = 0,
) -> Sketch:
    """ResNet of basic blocks, ``depth`` per stage; ``small_stem`` is one 3x3 convolution, for small images."""
    net = Sketch("resnet18", size, seed)
    x = net.op("Relu", net.conv(INPUT, width, 3)) if small_stem else _imagenet_stem(net, width)
    for stage, blocks in enumerate(depth):
        for block in range(blocks):
            x = _basic_block(net, x, width << stage, 2 if stage and not block else 1)
    return _classify(net, x, classes)


@Builder
def tiny_resnet(*, seed: int = 0) -> Sketch:
    """Two basic blocks on 16x16 images, one with a projection; under 50 kB."""
    return resnet18.sketch(width=8, depth=(1, 1), size=16, classes=10, small_stem=True, seed=seed)


@Builder
def mobilenet_v1(*, width: float = 1.0, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """MobileNet-V1 (Howard et al. 2017): depthwise 3x3 and 1x1 convolutions in turn, each with Relu."""
    net = Sketch("mobilenet_v1", size, seed)
    x = net.op("Relu", net.conv(INPUT, _scaled(32, width), 3, stride=2))
    rows = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
    for filters, stride in rows:
        x = net.op("Relu", net.conv(x, net.channels[x], 3, stride=stride, group=net.channels[x]))
        x = net.op("Relu", net.conv(x, _scaled(filters, width)))
    return _classify(net, x, classes)


@Builder
def mobilenet_v2(*, width: float = 1.0, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """MobileNet-V2 (Sandler et al. 2018): inverted residuals with Relu6, linear bottlenecks."""
    net = Sketch("mobilenet_v2", size, seed)
    x = _relu6(net, net.conv(INPUT, _scaled(32, width), 3, stride=2))
    rows = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expansion, filters, blocks, first_stride in rows:
        for block in range(blocks):
            stride, inputs = (1 if block else first_stride), net.channels[x]
            hidden, y = inputs * expansion, x
            if expansion > 1:
                y = _relu6(net, net.conv(y, hidden))
            y = _relu6(net, net.conv(y, hidden, 3, stride=stride, group=hidden))
            residual = stride == 1 and _scaled(filters, width) == inputs
            y = net.conv(y, _scaled(filters, width), gamma=BRANCH if residual else 1.0)
            x = net.op("Add", x, y) if residual else y
    return _classify(net, _relu6(net, net.conv(x, _scaled(1280, max(width, 1.0)))), classes)


@Builder
def mobilenet_v3(*, width: float = 1.0, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """MobileNet-V3 small (Howard et al. 2019): HardSwish and squeeze-and-excitation."""
    net = Sketch("mobilenet_v3_small", size, seed)
    x = net.op("HardSwish", net.conv(INPUT, _scaled(16, width), 3, stride=2))
    rows = (
        (3, 16, 16, True, "Relu", 2),
        (3, 72, 24, False, "Relu", 2),
        (3, 88, 24, False, "Relu", 1),
        (5, 96, 40, True, "HardSwish", 2),
        (5, 240, 40, True, "HardSwish", 1),
        (5, 240, 40, True, "HardSwish", 1),
        (5, 120, 48, True, "HardSwish", 1),
        (5, 144, 48, True, "HardSwish", 1),
        (5, 288, 96, True, "HardSwish", 2),
        (5, 576, 96, True, "HardSwish", 1),
        (5, 576, 96, True, "HardSwish", 1),
    )
    for kernel, expanded, filters, squeeze, activation, stride in rows:
        inputs, hidden, y = net.channels[x], _scaled(expanded, width), x
        if hidden != inputs:
            y = net.op(activation, net.conv(y, hidden))
        y = net.op(activation, net.conv(y, hidden, kernel, stride=stride, group=hidden))
        if squeeze:
            y = _squeeze_and_excite(net, y)
        residual = stride == 1 and _scaled(filters, width) == inputs
        y = net.conv(y, _scaled(filters, width), gamma=BRANCH if residual else 1.0)
        x = net.op("Add", y, x) if residual else y
    x = net.op("HardSwish", net.conv(x, _scaled(576, width)))
    x = net.op("HardSwish", net.linear(net.flat_mean(x), _scaled(1024, width)))
    net.linear(x, classes, output=OUTPUT)
    return net


@Builder
def vgg16(*, width: int = 64, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """VGG-16 (Simonyan & Zisserman 2015), configuration D: 3x3 convolutions with biases, three large Gemm."""
    return _vgg("vgg16", (2, 2, 3, 3, 3), width, size, classes, seed)


@Builder
def vgg19(*, width: int = 64, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """VGG-19, configuration E."""
    return _vgg("vgg19", (2, 2, 4, 4, 4), width, size, classes, seed)


@Builder
def googlenet(*, width: float = 1.0, size: int = 224, classes: int = 1000, seed: int = 0) -> Sketch:
    """GoogleNet (Szegedy et al. 2015): nine modules of 1x1, 3x3, 5x5 and pooled branches, no auxiliary heads.

    BatchNormalization in place of local response normalization, as frameworks' model collections have it.
    """
    net = Sketch("googlenet", size, seed)

    def layer(x: str, filters: int, kernel: int = 1, stride: int = 1) -> str:
        return net.op("Relu", net.conv(x, _scaled(filters, width), kernel, stride=stride))

    x = net.max_pool(layer(INPUT, 64, 7, 2), 3, 2)
    x = net.max_pool(layer(layer(x, 64), 192, 3), 3, 2)
    # 1x1; 1x1 before 3x3, 3x3; 1x1 before 5x5, 5x5; 1x1 after the pool
    stages: tuple[tuple[tuple[int, ...], ...], ...] = (
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        (
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
        ),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
    )
    for number, stage in enumerate(stages):
        if number:
            x = net.max_pool(x, 3, 2)
        for point, before_3x3, of_3x3, before_5x5, of_5x5, pooled in stage:
            x = net.concat(
                layer(x, point),
                layer(layer(x, before_3x3), of_3x3, 3),
                layer(layer(x, before_5x5), of_5x5, 5),
                layer(net.max_pool(x, 3, 1), pooled),
            )
    return _classify(net, x, classes)


@Builder
def inception_like(
    *,
    width: int = 32,
    modules: int = 3,
    size: int = 64,
    classes: int = 100,
    seed: int = 0,
) -> Sketch:
    """Modules of four branches (1x1, two 3x3, AveragePool, MaxPool) joined by Concat, pooled in between."""
    net = Sketch("inception_like", size, seed)
    x = net.op("Relu", net.conv(INPUT, width, 3, stride=2))
    for module in range(modules):
        if module:
            x = net.max_pool(x, 3, 2)
        point = net.op("Relu", net.conv(x, width))
        deep = net.op("Relu", net.conv(x, width))
        deep = net.op("Relu", net.conv(deep, width, 3))
        deep = net.op("Relu", net.conv(deep, width, 3))
        mean = net.op("Relu", net.conv(net.average_pool(x, 3, 1), width))
        x = net.concat(point, deep, mean, net.max_pool(x, 3, 1))
    return _classify(net, x, classes)


@Builder
def deep_chain(blocks: int, *, width: int = 4, size: int = 8, seed: int = 0) -> Sketch:
    """Basic blocks on tiny tensors, 15 nodes each with fake quant: 33 make 500 nodes, 333 make 5,000."""
    net = Sketch("deep_chain", size, seed)
    x = net.op("Relu", net.conv(INPUT, width, 3))
    for _ in range(blocks):
        x = _basic_block(net, x, width, 1)
    return _classify(net, x, 10)


def _bottlenecks(net: Sketch, width: int, depth: tuple[int, ...]) -> str:
    x = _imagenet_stem(net, width)
    for stage, blocks in enumerate(depth):
        filters = width << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = net.op("Relu", net.conv(x, filters))
            y = net.op("Relu", net.conv(y, filters, 3, stride=stride))
            x = _join(net, net.conv(y, 4 * filters, gamma=BRANCH), x, stride)
    return x


def _vgg(name: str, depth: tuple[int, ...], width: int, size: int, classes: int, seed: int) -> Sketch:
    net, x = Sketch(name, size, seed), INPUT
    for stage, layers in enumerate(depth):
        for _ in range(layers):
            x = net.op("Relu", net.conv(x, width << min(stage, 3), 3, gamma=None))
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Flatten", x, channels=net.channels[x] * (size >> len(depth)) ** 2, axis=1)
    for _ in range(2):
        x = net.op("Relu", net.linear(x, 64 * width))
    net.linear(x, classes, output=OUTPUT)
    return net


def _imagenet_stem(net: Sketch, filters: int) -> str:
    return net.max_pool(net.op("Relu", net.conv(INPUT, filters, 7, stride=2)), 3, 2)


def _basic_block(net: Sketch, x: str, filters: int, stride: int) -> str:
    y = net.op("Relu", net.conv(x, filters, 3, stride=stride))
    return _join(net, net.conv(y, filters, 3, gamma=BRANCH), x, stride)


def _join(net: Sketch, y: str, x: str, stride: int) -> str:
    """Relu of ``y`` plus the shortcut, projected where the shapes differ."""
    if stride != 1 or net.channels[x] != net.channels[y]:
        x = net.conv(x, net.channels[y], stride=stride)
    return net.op("Relu", net.op("Add", y, x))


def _squeeze_and_excite(net: Sketch, x: str) -> str:
    channels = net.channels[x]
    gate = net.op("GlobalAveragePool", x)
    gate = net.op("Relu", net.conv(gate, _scaled(channels, 0.25), gamma=None))
    gate = net.op("HardSigmoid", net.conv(gate, channels, gamma=None), alpha=1 / 6, beta=0.5)
    return net.op("Mul", x, gate)


def _relu6(net: Sketch, x: str) -> str:
    return net.op("Clip", x, net.constant("relu6.min", 0.0), net.constant("relu6.max", 6.0))


def _scaled(channels: int, width: float) -> int:
    """The nearest multiple of 8, not more than a tenth below, as the MobileNets round."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels * width else rounded + 8


def _classify(net: Sketch, x: str, classes: int) -> Sketch:
    net.linear(net.flat_mean(x), classes, output=OUTPUT)
    return net
