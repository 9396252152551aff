"""Small ONNX files for the tests of the runner."""
import numpy as np


def conv_file(batch, half=False, weight=None, channels=3, size=8, scale=1.):
    """A 3x3 convolution and the mean over all positions, as bytes: (batch, channels, size, size) -> (batch, 4).

    With half, its inside is float16, and input and output are float32.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((4, channels, 3, 3), dtype=np.float32) * scale if weight is None else weight
    inner = [helper.make_node('Conv', ['x', 'weight'], ['y'], pads=[1] * 4), helper.make_node('GlobalAveragePool', ['y'], ['z'])]
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [helper.make_node('Cast', ['input'], ['x'], to=kind), *inner, helper.make_node('Flatten', ['z'], ['flat']),
             helper.make_node('Cast', ['flat'], ['output'], to=TensorProto.FLOAT)]
    first = 'N' if batch is None else batch
    graph = helper.make_graph(
        nodes, 'conv', [helper.make_tensor_value_info('input', TensorProto.FLOAT, [first, channels, size, size])],
        [helper.make_tensor_value_info('output', TensorProto.FLOAT, [first, 4])],
        [numpy_helper.from_array(weight.astype(np.float16 if half else np.float32), 'weight')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()
