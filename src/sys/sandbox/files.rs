//! Which files: landlock.

use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, path_beneath_rules,
};

use super::SandboxError;

/// The version whose rights are used: of Linux 6.10, with devices. An older kernel leaves out what
/// it does not know.
const VERSION: ABI = ABI::V5;

/// What a confined thread may do with files. Nothing can be executed at all.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Directories to make, write, rename and remove in.
    pub write: Vec<PathBuf>,
    /// Devices to open.
    pub devices: Vec<PathBuf>,
    /// Directories and files to read, besides those above; `None` for everything. What is not
    /// there is passed over.
    pub read: Option<Vec<PathBuf>>,
}

/// Confines the calling thread. Gives the version of the interface that is in force.
pub(super) fn restrict(policy: &Policy) -> Result<Option<i32>, SandboxError> {
    let refused = SandboxError::Files;
    let read = AccessFs::from_read(VERSION);
    let mut handled = AccessFs::from_write(VERSION) | AccessFs::Execute;
    if policy.read.is_some() {
        handled |= read;
    }
    let without_programs = |rights: BitFlags<AccessFs>| rights & handled & !AccessFs::Execute;
    let all = without_programs(AccessFs::from_all(VERSION));
    let device = without_programs(AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev);
    let build = || -> Result<_, RulesetError> {
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(handled)?
            .create()?
            .add_rules(path_beneath_rules(&policy.write, all))?
            .add_rules(path_beneath_rules(&policy.devices, device))?;
        if let Some(dirs) = &policy.read {
            rules = rules.add_rules(path_beneath_rules(dirs, without_programs(read)))?;
        }
        rules.restrict_self()
    };
    let status = build().map_err(refused)?;
    Ok(match status.ruleset {
        RulesetStatus::NotEnforced => None,
        _ => version(status.landlock),
    })
}

/// Version of landlock's interface in this kernel, or `None` if it has none or does not use it.
/// Confines nothing.
pub fn landlock_version() -> Option<i32> {
    const CREATE_RULESET_VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no memory and only returns a number.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, CREATE_RULESET_VERSION)
    };
    i32::try_from(version).ok().filter(|version| *version > 0)
}

fn version(status: LandlockStatus) -> Option<i32> {
    match status {
        LandlockStatus::Available { effective_abi, kernel_abi } => Some(kernel_abi.unwrap_or(effective_abi as i32)),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => None,
    }
}
