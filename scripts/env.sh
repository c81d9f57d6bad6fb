# Sourced by the other scripts: makes or reuses .venv and installs what is missing.
#
#   prepare_environment [EXTRA...]     e.g. prepare_environment dev parity
#
# PYTHON names the interpreter to start from (3.11 or newer), VENV the environment's folder,
# CONSTRAINTS the file of exact versions (constraints.txt, or constraints-next.txt for the newest).

prepare_environment() {
  local extras python stamp
  extras=$(IFS=,; echo "$*")
  VENV=${VENV:-.venv}
  CONSTRAINTS=${CONSTRAINTS:-constraints.txt}
  if [ ! -x "$VENV/bin/python" ]; then
    python=${PYTHON:-}
    for candidate in python3 python3.12 python3.11 python3.13; do
      [ -n "$python" ] && break
      if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
        2>/dev/null; then
        python=$candidate
      fi
    done
    if [ -z "$python" ]; then
      echo "No Python 3.11 to 3.13 found: install one, or name another: PYTHON=/path/to/python $0" >&2
      return 2
    fi
    echo "Creating $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
  fi
  # What is installed is remembered by the content of the files that say what to install.
  stamp="$VENV/.installed-${extras:-none}"
  if ! cat pyproject.toml "$CONSTRAINTS" | cmp -s - "$stamp"; then
    echo "Installing mlclip_jax${extras:+ with $extras} (exact versions in $CONSTRAINTS)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$CONSTRAINTS" --editable ".${extras:+[$extras]}"
    case ",$extras," in
      # Without its dependencies: only its models, checkpoints' names and vocabulary are compared
      # with, and its torchvision has no build for every CPU.
      *,parity,*) "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$CONSTRAINTS" --no-deps open_clip_torch ;;
    esac
    cat pyproject.toml "$CONSTRAINTS" > "$stamp"
  fi
  export PATH="$PWD/$VENV/bin:$PATH"
}
