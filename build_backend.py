"""PEP 517 hook: scikit-build-core, and torch for its headers only where the target environment has none.

As a plain build requirement torch would be downloaded (gigabytes, the CUDA build) into pip's isolated build
environment even beside an installed torch. The kernels need its headers and one library to link with, of any
version from 2.11 on; from an isolated build, sysconfig still names the target environment's site-packages.
"""

import sysconfig
from pathlib import Path

from scikit_build_core import build as _skbuild
from scikit_build_core.build import *  # noqa: F403

TORCH = "torch==2.13.0"


def torch_requirement(config_settings=None, site_packages: str | None = None) -> list[str]:
    """[TORCH], or [] where headers are in site-packages or the caller names their folder."""
    site_packages = site_packages or sysconfig.get_path("purelib")
    headers = Path(site_packages, "torch/include/torch/csrc/stable")
    named = "cmake.define.FLUTE_TORCH_DIR" in (config_settings or {})
    return [] if named or headers.is_dir() else [TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _skbuild.get_requires_for_build_wheel(config_settings) + torch_requirement(config_settings)


def get_requires_for_build_editable(config_settings=None):
    return _skbuild.get_requires_for_build_editable(config_settings) + torch_requirement(config_settings)
