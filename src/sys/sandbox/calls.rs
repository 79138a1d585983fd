//! Which system calls: seccomp.
//!
//! A refused call fails with `EPERM` instead of ending the process: a call that this list forgot
//! costs one operation, not the readers of a host. The kernel tells its log of each.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::SandboxError;

/// A compiled filter.
pub(super) struct Filter(BpfProgram);

impl Filter {
    /// Puts the calling thread under the filter, besides those it is under already.
    pub(super) fn apply(&self) -> bool {
        // The other way is older, and refuses what it refuses in silence.
        self.apply_logged() || apply_filter(&self.0).is_ok()
    }

    /// With `SECCOMP_FILTER_FLAG_LOG`: Linux 4.14 (`seccomp(2)`).
    pub(super) fn apply_logged(&self) -> bool {
        let Ok(len) = libc::c_ushort::try_from(self.0.len()) else { return false };
        // Both are the kernel's `struct sock_filter`, which it only reads.
        let program = libc::sock_fprog { len, filter: self.0.as_ptr().cast_mut().cast() };
        // SAFETY: two integers and zeros; no memory is passed.
        let bound = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == 0;
        // SAFETY: `program` and the instructions it points to, as many as it says, outlive the call; the kernel
        // copies and checks them.
        bound
            && unsafe {
                libc::syscall(
                    libc::SYS_seccomp,
                    libc::SECCOMP_SET_MODE_FILTER,
                    libc::SECCOMP_FILTER_FLAG_LOG,
                    &raw const program,
                )
            } == 0
    }
}

/// Whether this kernel has filters. It refuses an address that nothing is at, which is the test
/// that changes nothing (`seccomp(2)`, "to determine whether filters are supported").
pub(super) fn is_available() -> bool {
    // SAFETY: a null program is refused with EFAULT before anything else happens; no memory of
    // ours is passed.
    let refused = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, 0, 0, 0) };
    refused == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

/// What no confined thread may do: change the tree of mounts, start programs, look into or steer
/// other processes, change the kernel, or speak other protocols than those of sources and sockets.
pub(super) fn wide() -> Result<Filter, SandboxError> {
    let denied = [
        // mounts; `fsmount` and its kin are as good as `mount`
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_quotactl,
        // programs
        libc::SYS_execve,
        libc::SYS_execveat,
        // other processes
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_pidfd_getfd,
        libc::SYS_kcmp,
        libc::SYS_migrate_pages,
        libc::SYS_move_pages,
        // the kernel and the machine
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_syslog,
        libc::SYS_acct,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        libc::SYS_vhangup,
        // ways around the rules for paths and calls
        libc::SYS_open_by_handle_at,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_personality,
    ];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = denied.into_iter().map(|call| (call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    rules.extend(
        [libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt, libc::SYS_kexec_file_load]
            .map(|call| (call, Vec::new())),
    );
    // Rings are made outside, for FUSE alone, and can do nothing else. Whoever has one may only switch it on and use it.
    let enable = argument(1, SeccompCmpOp::Ne, ENABLE_RINGS);
    rules.insert(libc::SYS_io_uring_register, vec![all_of([enable])?]);
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let foreign = families.map(|family| argument(0, SeccompCmpOp::Ne, u64::from(family.unsigned_abs())));
    rules.insert(libc::SYS_socket, vec![all_of(foreign)?]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM.unsigned_abs()))
}

/// The little that decoding, writing to the cache and answering the kernel take.
pub(super) fn narrow() -> Result<Filter, SandboxError> {
    listed_only(narrow_rules()?)
}

/// The same, and what a keeper does with its sockets, which are local ones, and with a daemon that it
/// has had started.
pub(super) fn keeper() -> Result<Filter, SandboxError> {
    let mut rules = narrow_rules()?;
    let calls = [
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_accept4,
        libc::SYS_connect,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_wait4,
        libc::SYS_waitid,
        libc::SYS_geteuid,
    ];
    rules.extend(calls.map(|call| (call, Vec::new())));
    let local = argument(0, SeccompCmpOp::Eq, u64::from(libc::AF_UNIX.unsigned_abs()));
    rules.insert(libc::SYS_socket, vec![all_of([local])?]);
    listed_only(rules)
}

fn listed_only(rules: BTreeMap<i64, Vec<SeccompRule>>) -> Result<Filter, SandboxError> {
    compile(rules, SeccompAction::Errno(libc::EPERM.unsigned_abs()), SeccompAction::Allow)
}

fn narrow_rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, SandboxError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = NARROW.iter().map(|call| (*call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    rules.extend(NARROW_X86_64.iter().map(|call| (*call, Vec::new())));
    let enable = argument(1, SeccompCmpOp::Eq, ENABLE_RINGS);
    rules.insert(libc::SYS_io_uring_register, vec![all_of([enable])?]);
    let not_executable = || all_of([argument(2, SeccompCmpOp::MaskedEq(u64::from(libc::PROT_EXEC.unsigned_abs())), 0)]);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    // For ends that nothing may follow: signals to this very process.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![all_of([argument(0, SeccompCmpOp::Eq, own)])?]);
    rules.insert(libc::SYS_kill, vec![all_of([argument(0, SeccompCmpOp::Eq, own)])?]);
    // For names of threads and of memory.
    let names = [libc::PR_SET_NAME, libc::PR_SET_VMA].map(|name| u64::from(name.unsigned_abs()));
    let name = |value| all_of([argument(0, SeccompCmpOp::Eq, value)]);
    rules.insert(libc::SYS_prctl, vec![name(names[0])?, name(names[1])?]);
    Ok(rules)
}

/// `IORING_REGISTER_ENABLE_RINGS`.
const ENABLE_RINGS: u64 = 12;

/// Calls that a narrowed thread may make with any arguments.
const NARROW: &[i64] = &[
    // open files, and those beneath the directories that landlock leaves
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_flock,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_sendfile,
    // sockets that are there already: the keepers hear of marks that go
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    // events
    libc::SYS_ppoll,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_io_uring_enter,
    libc::SYS_fanotify_mark,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    // memory
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_msync,
    // threads and time
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    // putting on a narrower filter, which only takes away
    libc::SYS_seccomp,
];

/// The same in older dress, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const NARROW_X86_64: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_readlink,
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_time,
];

fn argument(number: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value)
}

fn all_of<const N: usize>(
    conditions: [Result<SeccompCondition, BackendError>; N],
) -> Result<SeccompRule, SandboxError> {
    let conditions = conditions.into_iter().collect::<Result<_, _>>();
    conditions.and_then(SeccompRule::new).map_err(SandboxError::Calls)
}

pub(super) fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<Filter, SandboxError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(SandboxError::Calls)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, arch).map_err(SandboxError::Calls)?;
    filter.try_into().map(Filter).map_err(SandboxError::Calls)
}
