#!/usr/bin/env bash
# Set up what is missing, then run the loop (default), the tests (--test), build the site (--site), or show what there is
# (--list, --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

find_python() {
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "error: Python 3.11 or newer is needed; install it, or use 'conda env create -f environment.yml'" >&2
  exit 1
}

# An active environment that has this checkout installed, with all it needs, is used. Else .venv is made from the pins.
ready() { "$1" -P - 2>/dev/null <<'P'
import importlib.metadata as m, os, re, sys, tomllib
import irpo_utils
if os.path.realpath(os.path.dirname(irpo_utils.__file__)) != os.path.realpath("irpo_utils"): sys.exit(1)
if not m.files("irpo-utils"): sys.exit(1)
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for pin in project["dependencies"] + project["optional-dependencies"]["dev"]:
    pin, _, marker = pin.partition(";")
    if "linux" in marker and sys.platform != "linux": continue  # the only marker that a pin has
    name, wanted = pin.split("==")
    if m.version(name).split("+")[0] != wanted: sys.exit(1)
P
}
# A GPU is tried with the torch that is there, of whatever version: its machine may have no network.
if [ "${1:-}" = --gpu-check ] && python3 - 2>/dev/null <<'P'
import sys
import torch, transformers, peft, bitsandbytes, pydantic, filelock, psutil
sys.exit(sys.version_info < (3, 11))
P
then
  exec python3 -m irpo_utils "$@"
fi
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "$active" ] && ready "$active/bin/python"; then
  python="$active/bin/python"
else
  python=.venv/bin/python
  if ! { [ -x "$python" ] && ready "$python"; }; then
    echo "setting up .venv from the pins in pyproject.toml (once, a few minutes) ..." >&2
    base=$(find_python)
    "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || "$base" -m venv --clear .venv
    # torch first: a plain dependency resolution may look at builds that are not wanted
    for wanted in "$(grep -o 'torch==[0-9.]*' pyproject.toml | head -1)" "-e .[dev]"; do
      # shellcheck disable=SC2086
      "$python" -m pip install --quiet --disable-pip-version-check $wanted || {
        echo "error: pip could not install ${wanted#-e }; is there a network, or a package index (PIP_INDEX_URL)? The same command goes on" >&2
        exit 1
      }
    done
  fi
fi
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
export PATH="$(dirname "$python"):$PATH"
# The site is built in an environment of its own, which does not hold the project: .venv-site, or what IRPO_SITE_PYTHON names.
site_ready() { .venv-site/bin/python - 2>/dev/null <<'P'
import importlib.metadata as m, sys, tomllib
for pin in tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["site"]:
    name, wanted = pin.split("==")
    if m.version(name) != wanted: sys.exit(1)
P
}
set_up_site() {
  echo "setting up .venv-site from the group 'site' in pyproject.toml (once, a minute) ..." >&2
  .venv-site/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv-site
  for wanted in "--upgrade pip>=25.1" "--group site"; do  # the first pip that knows groups
    # shellcheck disable=SC2086
    .venv-site/bin/python -m pip install --quiet --disable-pip-version-check $wanted || {
      echo "error: pip could not install ${wanted#--upgrade }; is there a network, or a package index (PIP_INDEX_URL)? The same command goes on" >&2
      exit 1
    }
  done
}
if [ "${1:-}" = --debug ] && [ $# -gt 1 ]; then  # behind the command, where it is looked for
  first=$2; shift 2; set -- "$first" --debug "$@"
fi
case "${1:-}" in
  --site) [ -n "${IRPO_SITE_PYTHON:-}" ] || site_ready || set_up_site ;;
esac
case "${1:-}" in
  --test) shift; [ "${1:-}" != --debug ] || shift; exec "$python" -m pytest "$@" ;;
  *) exec "$python" -m irpo_utils "$@" ;;
esac
