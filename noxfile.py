"""Checks that take too long for every change: `pip install nox`, then `nox -s mutation`."""

import nox

nox.options.sessions = []

# What `third_party` sweeps. The second group asks for old versions of what the first has, or for
# much that no model needs, so it comes without; what its models import is in the first, too.
LIBRARIES = """ultralytics transformers segmentation-models-pytorch monai torch-geometric kornia
    open-clip-torch pytorchcv pytorch-tcn omegaconf pycocotools hyperpyyaml sentencepiece soundfile
    scipy pandas joblib fvcore iopath av six h5py imageio scikit-image anyascii langdetect pyclipper
    shapely pypdfium2 rapidfuzz validators python-bidi yapf addict gdown tensorboard""".split()
WITHOUT_DEPENDENCIES = """asteroid asteroid-filterbanks dynamic-network-architectures easyocr effdet
    efficientnet-pytorch facenet-pytorch julius lightly mmcv-lite mmengine opencv-python-headless
    openunmix pretrainedmodels python-doctr pytorchvideo resnest speechbrain torchaudio torchreid
    torchxrayvision""".split()


@nox.session
def mutation(session: nox.Session) -> None:
    """Put faults into the code and count those that the tests catch: `-- --help` says how."""
    session.install("-e", ".[dev,mutation]")
    session.run("python", "tests/tools/mutation.py", *session.posargs)


@nox.session
def third_party(session: nox.Session) -> None:
    """Fold the batch norms of models of many libraries: `-- --help` says how."""
    session.install("-e", ".[dev]", *LIBRARIES)
    session.install("--no-deps", *WITHOUT_DEPENDENCIES)
    session.run("python", "tests/tools/third_party.py", *session.posargs)
