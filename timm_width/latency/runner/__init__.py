"""Times ONNX files: a package that runs on its own, with numpy, onnx and one of onnxruntime, tensorrt or a trtexec program."""
