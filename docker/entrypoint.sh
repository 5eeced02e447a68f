#!/bin/sh
# Entry point of the image: settle what depends on how the container was started, then become `synthseg`.
set -eu

# A folder for temporary files, and for what libraries keep in the home folder. With --read-only and no --tmpfs only
# shared memory can be written to.
for folder in "${TMPDIR:-/tmp}" /tmp /dev/shm; do
    if [ -d "$folder" ] && [ -w "$folder" ]; then
        export TMPDIR="$folder"
        [ -w "${HOME:-/tmp}" ] || export HOME="$folder"
        break
    fi
done

# As many threads as --cpus grants. PyTorch sees the machine's processors, and waits for those it is not given.
quota() {
    if [ -r /sys/fs/cgroup/cpu.max ]; then
        read -r allowed period < /sys/fs/cgroup/cpu.max
    elif [ -r /sys/fs/cgroup/cpu/cpu.cfs_quota_us ]; then
        read -r allowed < /sys/fs/cgroup/cpu/cpu.cfs_quota_us
        read -r period < /sys/fs/cgroup/cpu/cpu.cfs_period_us
    else
        return 1
    fi
    case $allowed in max | -*) return 1 ;; esac
    echo $(((allowed + period - 1) / period))
}
if [ -z "${OMP_NUM_THREADS:-}" ] && threads=$(quota) && [ "$threads" -lt "$(nproc)" ]; then
    export OMP_NUM_THREADS="$threads"
fi

# With less than this even Python is killed, and could say nothing.
least_mib=224
for file in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
    if [ -r "$file" ] && read -r limit < "$file" && [ "$limit" != max ] && [ "$limit" -lt $((least_mib * 1048576)) ]; then
        echo "error: the container may use only $((limit / 1048576)) MiB of memory; give it more: --memory 4g" >&2
        exit 2
    fi
done

# A folder of the caller that this user cannot write to is the commonest mistake: say what mends it. A folder that was
# mounted read-only is meant so.
if mount=$(grep -E ' /data r[ow][, ]' /proc/self/mountinfo) && [ ! -w /data ]; then
    case $mount in
    *" /data ro"*) ;;
    *)
        owner=$(stat -c %u:%g /data)
        [ "$owner" = "$(id -u):$(id -g)" ] ||
            echo "note: /data belongs to user $owner, and this container runs as $(id -u):$(id -g), who cannot write" \
                "there; start it with --user $owner, or make that folder writable for $(id -u):$(id -g)" >&2
        ;;
    esac
fi

exec synthseg "$@"
