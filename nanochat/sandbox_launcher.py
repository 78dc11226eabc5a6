"""Run by sandbox.py in a fresh interpreter: builds the walls around a program, then becomes it.

Its one argument is JSON: `walls` (see sandbox.WALLS), `folder` (empty, the program's own), `visible` (folders of the
interpreter), `limits` (by name of resource), `filter` (whether to refuse system calls), `pipes` (descriptors that the
program is given), `report` (descriptor for what goes wrong before the program runs; closed by becoming it), `lifeline`
(descriptor: once it can be read the program has to end), `parent` (its id). The program comes on stdin.
"""

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x2, 0x1000, 0x4000, 0x40000
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = 2, -100, 0x8000, 442
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
UNUSED_IDS = range(61184, 65520)  # those that systemd hands to services for as long as they run
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
OWN, FOLDER_BYTES = "/var/tmp", 16 << 20  # the folder of the program, in its new root

# System calls without which plain programs do, and which reach other processes, the network, or memory that the limits
# of a process do not bound (shared memory, semaphores, keys, rings): their numbers on x86-64 and on aarch64.
REFUSED = {
    "socket": (41, 198), "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97), "setns": (308, 268),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "io_uring_setup": (425, 425),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fallocate": (285, 47),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in REFUSED, AUDIT_ARCH
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF
ALLOW, PERMISSION_DENIED = 0x7FFF0000, 0x00050001
OTHER_ABI = 0x40000000  # numbers from here on are those of x32


def main():
    config = json.loads(sys.argv[1])
    try:
        user = UNUSED_IDS[os.getpid() % len(UNUSED_IDS)] if os.geteuid() == 0 else None  # root's rights are laid down
        if config["walls"] == "namespaces":
            unshare(user)
            new_root(config["folder"], config["visible"], os.geteuid() if user is None else user)
            live_in_a_child([*config["pipes"], config["report"]], config["lifeline"])
        elif config["walls"] == "user":
            os.chown(config["folder"], user, user)
            os.chdir(config["folder"])
        if user is not None and config["walls"] != "limits":
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        if sys.platform == "linux":
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if config["walls"] != "namespaces" and os.getppid() != config["parent"]:
                os._exit(1)  # the parent died before the line above could see it
        for name, limit in config["limits"].items():
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        os.set_inheritable(config["report"], False)
        os.set_inheritable(config["lifeline"], False)
        if config["filter"]:
            refuse_system_calls()
        os.execve(sys.executable, [sys.executable, "-I", "-"], {})
    except BaseException as error:
        os.write(config["report"], f"{type(error).__name__}: {error}".encode())
        os._exit(1)


def call(name, *args):
    if getattr(libc, name)(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option, value):
    call("prctl", option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3)


def mount(source, target, kind=None, flags=0, options=None):
    texts = (text and os.fsencode(text) for text in (source, target, kind))
    call("mount", *texts, ctypes.c_ulong(flags), options and options.encode())


def unshare(user):
    """Namespaces of its own; without root's rights it takes a user namespace to make the others."""
    mine = os.geteuid(), os.getegid()
    own_user = CLONE_NEWUSER if user is None else 0
    call("unshare", own_user | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    if own_user:
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{mine[0]} {mine[0]} 1"),
            ("gid_map", f"{mine[1]} {mine[1]} 1"),
        ):
            write(f"/proc/self/{file}", text)
    # Shared memory and message queues are no part of a process's address space, so its limit does not bound them.
    for file in ("/proc/sys/kernel/shmall", "/proc/sys/kernel/msgmni"):
        if os.access(file, os.W_OK):
            write(file, "0")


def write(file, text):
    with open(file, "w") as opened:
        opened.write(text)


def new_root(folder, visible, owner):
    """A root with the interpreter, the system's libraries and four devices, all of it read-only, and an empty folder of
    bounded size."""
    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for source in dict.fromkeys([*SYSTEM, *visible, *DEVICES]):
        target = folder + source
        if not os.path.exists(source) or os.path.exists(target):  # not here, or seen already within another
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(source):  # /lib is a link to /usr/lib
            os.symlink(os.readlink(source), target)
            continue
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        mount(source, target, flags=MS_BIND | MS_REC)
    os.makedirs(folder + OWN)
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID, 0, 0, 0)  # to set, to clear, propagation, user namespace
    call("syscall", MOUNT_SETATTR, AT_FDCWD, os.fsencode(folder), AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    options = (
        f"size={FOLDER_BYTES},nr_inodes=1000,mode=700,uid={owner},gid={owner if os.geteuid() == 0 else os.getegid()}"
    )
    mount("tmpfs", folder + OWN, "tmpfs", MS_NOSUID, options)
    os.chdir(folder)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir(OWN)


def live_in_a_child(pipes, lifeline):
    """Goes on in a child, the first process of the new namespace, with whose death everything in it ends. This process
    stays outside, kills the child when the parent says so or has died, and ends as the child does."""
    child = os.fork()
    if child == 0:
        os.setsid()  # what it sends to its group does not reach this process
        return
    for pipe in pipes:  # they are the child's
        os.close(pipe)
    select.select([os.pidfd_open(child), lifeline], [], [])
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def refuse_system_calls():
    """A seccomp filter, which holds until the program's end: those of REFUSED fail with "operation not permitted"."""
    column, architecture = MACHINES[os.uname().machine]
    numbers = [row[column] for row in REFUSED.values() if row[column] is not None]
    deny = 5 + len(numbers)  # the step to jump to; jumps are counted from the next step
    steps = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 0, deny - 2, architecture), (LOAD, 0, 0, 0)]
    steps.append((JUMP_AT_LEAST, deny - 4, 0, OTHER_ABI))
    steps += [(JUMP_EQUAL, deny - 5 - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, PERMISSION_DENIED)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0))


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    main()
