#!/bin/sh
# Build the image, or test it, with the first of docker, podman and buildah that works here.
#
#   docker/image.sh build     docker/image.sh test     docker/image.sh name
#
# Settings (environment): ENGINE, IMAGE, TORCH, BASE_IMAGE, BUILD_FLAGS, RUN_FLAGS; see docs/container.md.
set -eu
cd "$(dirname "$0")/.."

VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
TORCH=${TORCH:-cpu}
IMAGE=${IMAGE:-localhost/synthseg:$VERSION$([ "$TORCH" = cpu ] || echo "-$TORCH")}
BASE_IMAGE=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile | head -n 1)}

die() {
    echo "error: $*" >&2
    exit 2
}

# `docker` may be a client without an engine, so each is asked for more than its name.
works() { command -v "$1" > /dev/null && "$1" info > /dev/null 2>&1; }
if [ -n "${ENGINE:-}" ]; then
    works "$ENGINE" || die "ENGINE=$ENGINE does not run here"
else
    for ENGINE in docker podman buildah ''; do
        if [ -z "$ENGINE" ]; then
            die "no working docker, podman or buildah here; install one (Debian: apt-get install podman)"
        fi
        if works "$ENGINE"; then break; fi
    done
fi

# --------------------------------------------------------------------------------------------------------- build

# The digest of the base, so that the image says what it was built on; empty for a base that no registry knows.
base_digest() {
    case $BASE_IMAGE in *@sha256:*) echo "${BASE_IMAGE#*@}" && return ;; esac
    if [ "$ENGINE" = buildah ]; then
        buildah inspect --type image --format '{{.FromImageDigest}}' "$BASE_IMAGE"
    else
        "$ENGINE" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$BASE_IMAGE" | sed -n '1s/.*@//p'
    fi
}

have_base() {
    if [ "$ENGINE" = buildah ]; then
        buildah inspect --type image "$BASE_IMAGE" > /dev/null 2>&1
    else
        "$ENGINE" image inspect "$BASE_IMAGE" > /dev/null 2>&1
    fi
}

build() {
    have_base || "$ENGINE" pull "$BASE_IMAGE" > /dev/null || die "$BASE_IMAGE is not here and cannot be pulled; " \
        "give the base as BASE_IMAGE=NAME"
    revision=$(git rev-parse HEAD 2> /dev/null || true)
    if [ -n "$revision" ] && [ -n "$(git status --porcelain 2> /dev/null)" ]; then revision=$revision-changed; fi
    echo "building $IMAGE on $BASE_IMAGE with $ENGINE (torch: $TORCH)"
    # shellcheck disable=SC2086
    "$ENGINE" build -f docker/Dockerfile -t "$IMAGE" \
        --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "BASE_DIGEST=$(base_digest)" --build-arg "TORCH=$TORCH" \
        --build-arg "VERSION=$VERSION" --build-arg "REVISION=$revision" \
        --build-arg "CREATED=$(git log -1 --format=%cI 2> /dev/null || date -u +%Y-%m-%dT%H:%M:%SZ)" \
        ${BUILD_FLAGS:-} .
    "$ENGINE" images "$IMAGE"
}

# ---------------------------------------------------------------------------------------------------------- test

# contain [--as USER] [--memory SIZE] [--hard] [--program FILE] [--name NAME] FOLDER ARGUMENT...
# Run the image, without network, with FOLDER as /data. --hard: a read-only root, 1 MB of shared memory, no rights.
contain() {
    user='' memory='' hard='' program='' name=''
    while :; do
        case $1 in
        --as) user=$2 && shift 2 ;;
        --memory) memory=$2 && shift 2 ;;
        --program) program=$2 && shift 2 ;;
        --name) name=$2 && shift 2 ;;
        --hard) hard=yes && shift ;;
        *) break ;;
        esac
    done
    folder=$1 && shift
    if [ "$ENGINE" = buildah ]; then
        # buildah knows no read-only root, and takes limits when the container is made
        # shellcheck disable=SC2086
        box=$(buildah from --network none ${memory:+--memory $memory} ${hard:+--shm-size 1m} "$IMAGE")
        code=0
        # shellcheck disable=SC2086
        buildah run ${RUN_FLAGS:-} ${user:+--user $user} -v "$folder:/data" "$box" -- \
            "${program:-synthseg-entrypoint}" "$@" || code=$?
        buildah rm "$box" > /dev/null
        return $code
    fi
    kind=--rm
    if [ -n "$name" ]; then kind="--detach --name $name"; fi
    limits=
    if [ -n "$hard" ]; then
        limits="--read-only --shm-size 1m --cap-drop ALL --security-opt no-new-privileges"
        if [ "$ENGINE" = podman ]; then limits="$limits --read-only-tmpfs=false"; fi # else it adds a /tmp of its own
    fi
    # shellcheck disable=SC2086
    "$ENGINE" run $kind --network none $limits ${RUN_FLAGS:-} \
        ${memory:+--memory $memory} ${user:+--user $user} ${program:+--entrypoint $program} \
        -v "$folder:/data" "$IMAGE" "$@"
}

failures=0
passed() { echo "ok      $*"; }
failed() {
    echo "FAILED  $*"
    failures=$((failures + 1))
}
skipped() { echo "skipped $*"; }
expect() { # expect TEXT COMMAND...: the command succeeds
    what=$1 && shift
    if "$@"; then passed "$what"; else failed "$what"; fi
}

# The same voxels, byte by byte, and the same grid.
SAME='
import sys
import nibabel as nib
import numpy as np
one, other = (nib.load(name) for name in sys.argv[1:])
assert one.get_data_dtype() == other.get_data_dtype() and one.shape == other.shape, (one.header, other.header)
assert np.array_equal(one.affine, other.affine), (one.affine, other.affine)
one, other = (np.asanyarray(image.dataobj) for image in (one, other))
assert len(np.unique(one)) > 10, np.unique(one)
assert one.tobytes() == other.tobytes(), f"{(one != other).sum()} voxels differ"
'

run_tests() {
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    chmod 755 "$work"
    mkdir -m 777 "$work/data"
    cp synthseg/samples/colin27_t1.nii.gz "$work/data/scan.nii.gz"
    chmod 644 "$work/data/scan.nii.gz"
    log=$work/log

    if [ "$ENGINE" = buildah ]; then
        user=$(buildah inspect --type image --format '{{.OCIv1.Config.User}}' "$IMAGE")
        label=$(buildah inspect --type image --format '{{index .OCIv1.Config.Labels "org.opencontainers.image.version"}}' \
            "$IMAGE")
    else
        user=$("$ENGINE" image inspect --format '{{.Config.User}}' "$IMAGE")
        label=$("$ENGINE" image inspect --format '{{index .Config.Labels "org.opencontainers.image.version"}}' "$IMAGE")
    fi
    case $user in '' | 0 | 0:* | root*) failed "the user is not root: '$user'" ;; *) passed "the user is $user, not root" ;; esac
    expect "the label has version $VERSION" [ "$label" = "$VERSION" ]

    if contain "$work/data" > "$log" 2>&1 && grep -q segment "$log"; then
        passed "without arguments it shows the help"
    else
        failed "without arguments it shows the help: $(tail -n 3 "$log")"
    fi
    # What the documentation promises, but for the folder that any user can write to.
    if contain --hard --as 12345:54321 "$work/data" \
        segment /data/scan.nii.gz -o /data/hard.nii.gz --volumes /data/volumes.csv --overview /data/look.png \
        --threads 1 > "$log" 2>&1; then
        passed "no network, read-only, user 12345, 1 MB of shared memory: $(tail -n 1 "$log")"
    else
        failed "no network, read-only, user 12345, 1 MB of shared memory: $(tail -n 3 "$log")"
    fi
    for file in hard.nii.gz volumes.csv look.png; do
        owner=$(contain --as 12345:54321 --program stat "$work/data" -c %u:%g "/data/$file" 2>&1) || true
        expect "$file belongs to that user ($owner)" [ "$owner" = 12345:54321 ]
    done
    expect "nothing else is left in the folder" [ "$(find "$work/data" -mindepth 1 | wc -l)" = 4 ]

    if [ -x .venv/bin/synthseg ]; then
        .venv/bin/synthseg segment "$work/data/scan.nii.gz" -o "$work/data/outside.nii.gz" --device cpu --threads 1 \
            > "$log" 2>&1 || failed "the scan outside the container: $(tail -n 3 "$log")"
        if contain --program python "$work/data" -c "$SAME" /data/hard.nii.gz /data/outside.nii.gz > "$log" 2>&1; then
            passed "the same voxels as outside the container"
        else
            failed "the same voxels as outside the container: $(tail -n 1 "$log")"
        fi
    else
        skipped "the same voxels as outside the container: there is no .venv (make demo makes one)"
    fi

    # shellcheck disable=SC2016
    seen=$(contain --memory 300m --program sh "$work/data" -c \
        'cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2> /dev/null' 2> /dev/null) || true
    if [ "$seen" = 314572800 ]; then
        for size in 40m 240m 1g; do
            code=0
            contain --memory $size "$work/data" segment /data/scan.nii.gz -o /data/small.nii.gz --threads 1 \
                > "$log" 2>&1 || code=$?
            if [ $code = 2 ] && grep -q '^error: .* memory' "$log" && [ ! -e "$work/data/small.nii.gz" ]; then
                passed "--memory $size: $(grep '^error' "$log")"
            else
                failed "--memory $size should say so and exit with 2, but exits with $code: $(tail -n 3 "$log")"
            fi
        done
    else
        skipped "too little memory: $ENGINE cannot limit memory here"
    fi

    mkdir -m 755 "$work/closed"
    cp "$work/data/scan.nii.gz" "$work/closed/"
    contain --as 12345:54321 "$work/closed" segment /data/scan.nii.gz > "$log" 2>&1 || true
    if grep -q "start it with --user $(contain --program stat "$work/closed" -c %u:%g /data)" "$log"; then
        passed "a folder of somebody else: $(grep '^note' "$log")"
    else
        failed "a folder of somebody else: $(tail -n 3 "$log")"
    fi

    if [ "$ENGINE" = buildah ]; then
        skipped "stopping: buildah has no command for it"
    else
        name=synthseg-test-$$
        contain --name $name "$work/data" segment /data/scan.nii.gz -o /data/stopped.nii.gz --threads 1 > /dev/null
        sleep 6
        "$ENGINE" stop -t 60 "$name" > /dev/null
        code=$("$ENGINE" inspect --format '{{.State.ExitCode}}' "$name")
        "$ENGINE" rm -f "$name" > /dev/null
        expect "stop ends it with 143 ($code)" [ "$code" = 143 ]
        expect "and leaves no half-written file" [ "$(find "$work/data" -name '*stopped*' | wc -l)" = 0 ]
    fi
    [ $failures = 0 ] || die "$failures tests of $IMAGE failed"
    echo "all tests of $IMAGE passed"
}

case ${1:-} in
build) build ;;
test) run_tests ;;
name) echo "$IMAGE" ;;
*) die "expected: $0 build | test | name" ;;
esac
