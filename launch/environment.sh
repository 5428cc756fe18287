# shellcheck shell=bash
# Sourced: finds a Python, installs docker/versions.txt once, and puts the result on PATH.
#
#   source launch/environment.sh
#
# The environment takes about 5 GB, so it lives in ${XDG_CACHE_HOME:-$HOME/.cache}/megatron-elastic under a name made of the
# pins and the interpreter: clones with the same pins share it, and `.venv` in the clone is a link to it. The package itself
# is not installed in it, which would tie it to one clone: it is reached through PYTHONPATH and launch/bin.
# Returns 1 (so a caller under `set -e` exits 1) after one message when there is no usable Python or an install fails.

MEGATRON_ELASTIC_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
export MEGATRON_ELASTIC_ROOT

_me_say() { printf 'megatron-elastic: %s\n' "$*" >&2; }

# Prints "MAJOR.MINOR HAS_VENV" of an interpreter, or nothing when it does not run: a pyenv shim exists for every version
# that is installed and fails for those that are not selected.
_me_probe() {
  "$1" -I -c 'import sys
try:
    import ensurepip, venv
    able = 1
except ImportError:
    able = 0
print("%d.%d" % sys.version_info[:2], able)' 2>/dev/null </dev/null || true
}

# Lists candidate interpreters, best first: 3.12 is what the tests run with.
_me_candidates() {
  local minor found
  for minor in 12 13 14 15; do
    # All of them: a shim that does not run may hide one that does.
    type -aP "python3.$minor"
    for found in "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do
      [[ -x $found ]] && printf '%s\n' "$found"
    done
  done
  type -aP python3 python
  return 0
}

# Prints the interpreter to use; explains itself and returns 1 when there is none.
_me_find_python() {
  local candidate version able minor without_venv="" fallback=""
  while IFS= read -r candidate; do
    read -r version able <<<"$(_me_probe "$candidate")"
    [[ $version =~ ^3\.([0-9]+)$ ]] || continue
    minor="${BASH_REMATCH[1]}"
    ((minor >= 12)) || continue
    if ((able == 0)); then
      without_venv="${without_venv:-$candidate (Python $version)}"
    elif ((minor == 12)); then
      printf '%s\n' "$candidate"
      return 0
    else
      fallback="${fallback:-$candidate}"
    fi
  done < <(_me_candidates)
  if [[ -n $fallback ]]; then
    printf '%s\n' "$fallback"
    return 0
  fi
  if type -P uv >/dev/null; then
    candidate="$(uv python find '>=3.12' --no-project 2>/dev/null)" || candidate=""
    if [[ "$(_me_probe "${candidate:-/nonexistent}")" != *" 1" ]]; then
      _me_say "installing Python 3.12 with uv"
      uv python install 3.12 >&2 && candidate="$(uv python find --managed-python --no-project 3.12)"
    fi
    if [[ "$(_me_probe "${candidate:-/nonexistent}")" == *" 1" ]]; then
      printf '%s\n' "$candidate"
      return 0
    fi
  fi
  if [[ -n $without_venv ]]; then
    version="${without_venv##*Python }"
    _me_say "$without_venv cannot make virtual environments (no venv or ensurepip)." \
      "Install it: apt install python${version%)}-venv"
  else
    _me_say "no Python 3.12 or newer on PATH, under pyenv, or through uv." \
      "Install one (apt install python3.12 python3.12-venv; pyenv install 3.12; or install uv) and run this again."
  fi
  return 1
}

_me_digest() { sha256sum | cut -c1-16; }

# The pins alone, so that an edited comment rebuilds nothing.
_me_pins() { sed -E 's/[[:space:]]*#.*//; /^[[:space:]]*$/d' "$MEGATRON_ELASTIC_ROOT/docker/versions.txt" | LC_ALL=C sort; }

# Whether directory $1 holds a finished environment of the pins $2 whose interpreter still exists.
_me_ready() {
  [[ -f $1/.complete && -x $1/bin/python ]] && [[ "$(<"$1/.complete")" == "$2" ]]
}

# Installs the pins $3 with the interpreter $1 into the directory $2. The marker is written last: an install that was
# interrupted has none and is started again. (Built in place, since scripts in a virtual environment name their own path.)
_me_install() {
  local python="$1" target="$2" pins="$3" quiet="--quiet" start=$SECONDS
  [[ -t 2 ]] && quiet="--progress-bar=on"
  _me_say "installing the pinned packages into $target (about 5 GB; some minutes, once)"
  rm -rf -- "$target" || return 1
  if ! "$python" -I -m venv "$target" >&2; then
    _me_say "$python -m venv $target failed (above). On Debian and Ubuntu: apt install python3-venv"
    return 1
  fi
  # A user's pip settings for other installs would redirect this one.
  if ! env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX -u PIP_REQUIRE_VIRTUALENV -u PYTHONPATH \
    "$target/bin/python" -m pip install --no-input --disable-pip-version-check "$quiet" \
    -r "$MEGATRON_ELASTIC_ROOT/docker/versions.txt" >&2 </dev/null; then
    _me_say "the install failed (above). Free disk and network are needed once; run this again to start it over."
    return 1
  fi
  printf '%s' "$pins" >"$target/.complete.new" && mv -- "$target/.complete.new" "$target/.complete" || return 1
  _me_say "installed in $((SECONDS - start)) s"
}

# Prints the directory of the environment, made where it is missing.
_me_environment() {
  local link="$MEGATRON_ELASTIC_ROOT/.venv" pins python key cache target
  if [[ -z ${HOME:-} ]]; then
    _me_say "HOME is not set: the environment is kept under it. Set it, and run this again."
    return 1
  fi
  pins="$(_me_pins | _me_digest)" || return 1
  # Before any interpreter is looked for: a finished environment costs a few milliseconds.
  if [[ -L $link ]] && _me_ready "$link" "$pins"; then
    readlink -f -- "$link"
    return 0
  fi
  cache="${XDG_CACHE_HOME:-$HOME/.cache}/megatron-elastic"
  if ! mkdir -p -- "$cache" 2>/dev/null || [[ ! -w $cache ]]; then
    _me_say "cannot write $cache. Set XDG_CACHE_HOME to a writable folder with 5 GB free."
    return 1
  fi
  python="$(_me_find_python)" || return 1
  key="$({ printf '%s\n' "$pins"; "$python" -I -c 'import sys; print(sys.version, sys.base_prefix)'; } | _me_digest)" || return 1
  target="$cache/$key"
  if ! _me_ready "$target" "$pins"; then
    # One installer at a time: a second one waits, then finds the work done.
    (
      if type -P flock >/dev/null && ! flock -n 9; then
        _me_say "another run is installing $target: waiting for it"
        flock 9 || exit 1
      fi
      _me_ready "$target" "$pins" || _me_install "$python" "$target" "$pins" 9>&-
    ) 9>"$target.lock" || return 1
  fi
  if [[ -e $link && ! -L $link ]]; then
    _me_say "$link is not a link made here: left alone, $target is used"
  else
    ln -sfn -- "$target" "$link.$$" && mv -fT -- "$link.$$" "$link" || return 1
  fi
  printf '%s\n' "$target"
}

VIRTUAL_ENV="$(_me_environment)" || return 1
export VIRTUAL_ENV
case "$PATH:" in
  "$MEGATRON_ELASTIC_ROOT/launch/bin:$VIRTUAL_ENV/bin:"*) ;;
  *) export PATH="$MEGATRON_ELASTIC_ROOT/launch/bin:$VIRTUAL_ENV/bin:$PATH" ;;
esac
case ":${PYTHONPATH:-}:" in
  *":$MEGATRON_ELASTIC_ROOT:"*) ;;
  *) export PYTHONPATH="$MEGATRON_ELASTIC_ROOT${PYTHONPATH:+:$PYTHONPATH}" ;;
esac
unset PYTHONHOME
