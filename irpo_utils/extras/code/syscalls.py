"""Which system calls a program in the sandbox may make, as a seccomp filter for bwrap.

libseccomp (2.5 or newer) makes the filter, through pyseccomp. A call that this libseccomp does not know is answered as
by a kernel that does not have it, so that what a newer kernel brings stays closed. Of those that it knows, `DENIED`
fail. They are what the default profiles of Docker and containerd keep from a process without capabilities, and a few
that a program with the standard library alone has no use for. Threads, child processes, pipes, local sockets and files
go on as before. A call in another architecture's way (32 bits, x32) ends the process.
"""

from __future__ import annotations

import errno
import platform
import socket
import tempfile

MACHINES = ("x86_64", "aarch64")  # where the flags of `clone` are its first argument
NUMBERS = 1024  # the kernel's newest calls have numbers below 500
TOPICS = {
    "kernel keyrings": "add_key keyctl request_key",
    "ways into the kernel": "io_uring_setup io_uring_enter io_uring_register io_setup bpf perf_event_open userfaultfd",
    "other processes": "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp",
    "namespaces": "unshare setns pivot_root chroot",
    "mounts": "mount umount umount2 fsopen fsconfig fsmount fspick move_mount open_tree open_tree_attr mount_setattr "
    "statmount listmount listns",
    "files by handle": "name_to_handle_at open_by_handle_at fanotify_init fanotify_mark lookup_dcookie",
    "disks": "quotactl quotactl_fd swapon swapoff sysfs ustat nfsservctl",
    "the kernel itself": "kexec_load kexec_file_load init_module finit_module delete_module create_module query_module "
    "get_kernel_syms _sysctl lsm_set_self_attr reboot acct syslog vhangup uselib",
    "the clock": "settimeofday clock_settime clock_adjtime adjtimex stime",
    "the host's name": "sethostname setdomainname",
    "the processor": "ioperm iopl personality modify_ldt vm86 vm86old",
    "where memory lies": "get_mempolicy set_mempolicy set_mempolicy_home_node mbind migrate_pages move_pages "
    "remap_file_pages vmsplice",
    "memory that no limit on a process counts": "memfd_secret shmget shmat msgget semget mq_open",
    "sockets by another name": "socketcall",
}
DENIED = frozenset(name for names in TOPICS.values() for name in names.split())
UNKNOWN = frozenset({"clone3"})  # its flags lie in memory, where no filter looks; C libraries then take `clone`
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET. (NEWTIME is for `unshare` and `clone3` alone.)
NAMESPACES = 0x7E020000


class Missing(RuntimeError):
    """No filter can be made on this machine; the message says why."""


def seccomp_filter() -> bytes:
    """The filter as the BPF program that `bwrap --seccomp` reads. Raises Missing."""
    if platform.machine() not in MACHINES:
        raise Missing(f"it is made for {' and '.join(MACHINES)}, and this is {platform.machine()}")
    try:
        import pyseccomp as seccomp
    except ImportError:
        raise Missing("pyseccomp is not installed: pip install pyseccomp") from None
    except (RuntimeError, OSError, AttributeError) as error:
        raise Missing(f"libseccomp cannot be used: {error}; apt install libseccomp2") from None
    try:
        return _compiled(seccomp)
    except OSError as error:
        raise Missing(f"libseccomp cannot make it: {error}") from None


def _compiled(seccomp) -> bytes:
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    rules.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)  # a binary search, not one comparison a rule
    local = (seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX),)
    allowed_if = {
        "clone": (seccomp.Arg(0, seccomp.MASKED_EQ, NAMESPACES, 0),),
        "socket": local,
        "socketpair": local,
    }
    for number in range(NUMBERS):
        try:
            name = seccomp.resolve_syscall(seccomp.Arch.NATIVE, number).decode()
        except ValueError:  # no such call
            continue
        if name in DENIED:
            rules.add_rule(seccomp.ERRNO(errno.EPERM), number)
        elif name not in UNKNOWN:
            rules.add_rule(seccomp.ALLOW, number, *allowed_if.get(name, ()))
        if allowed_if.get(name) is local:
            refused = seccomp.ERRNO(errno.EAFNOSUPPORT)
            rules.add_rule(refused, number, seccomp.Arg(0, seccomp.NE, socket.AF_UNIX))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
