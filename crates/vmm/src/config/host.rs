//! What a machine needs of a host, compared before anything is made: features of the processor, registers,
//! clock, disks, interfaces.

use super::{ConfigError, VmConfig, is_same_rate};
use crate::cpu::{self, CpuidLeaf};
use crate::virtio;
use limosa_os::kvm::Kvm;

impl VmConfig {
    /// Checks that this host can run a guest that has seen these features and this clock rate.
    /// Opens KVM to ask and makes nothing.
    ///
    /// # Errors
    /// A limit does not hold, there is no KVM, or the first thing that the host lacks.
    pub fn check_host(&self) -> Result<(), ConfigError> {
        self.check()?;
        self.differences().into_iter().next().map_or(Ok(()), Err)
    }

    /// All that this host lacks for such a guest; nothing if it can run here.
    pub fn differences(&self) -> Vec<ConfigError> {
        let mut differences = Vec::new();
        match Kvm::open() {
            Ok(kvm) => {
                differences.extend(self.features(&kvm).err());
                differences.extend(self.check_registers(&kvm).err());
                differences.extend(self.compare_clock(&kvm).err());
            }
            Err(error) => differences.push(error.into()),
        }
        differences.extend(virtio::lacking(self).into_iter().map(ConfigError::from));
        differences
    }

    /// The features that its guest sees here: those that it has seen, or those of its model.
    ///
    /// # Errors
    /// This host's processor lacks some, or KVM does not tell.
    pub(crate) fn features(&self, kvm: &Kvm) -> Result<Vec<CpuidLeaf>, ConfigError> {
        let offered = cpu::machine_table(kvm, self.platform)?;
        let Some(wanted) = &self.cpuid else {
            let (model, features) = (self.model, self.model.missing(&offered));
            return if features.is_empty() {
                Ok(model.select(&offered))
            } else {
                Err(ConfigError::Model { model, features })
            };
        };
        let features = cpu::missing_features(wanted, &offered);
        if features.is_empty() {
            Ok(wanted.clone())
        } else {
            Err(ConfigError::Features { features })
        }
    }

    fn check_registers(&self, kvm: &Kvm) -> Result<(), ConfigError> {
        let offered = kvm.state_msrs()?;
        let wanted = self.msrs.iter().copied();
        let registers: Vec<u32> = wanted.filter(|msr| !offered.contains(msr)).collect();
        if registers.is_empty() {
            Ok(())
        } else {
            Err(ConfigError::Registers { registers })
        }
    }

    fn compare_clock(&self, kvm: &Kvm) -> Result<(), ConfigError> {
        let Some(wanted) = self.tsc_khz else {
            return Ok(());
        };
        let vm = kvm.create_vm(self.dirty_tracker)?;
        let offered = vm.create_vcpu(0)?.tsc_khz()?;
        self.check_clock(kvm, offered, wanted)
    }

    pub(crate) fn check_clock(
        &self,
        kvm: &Kvm,
        offered: u32,
        wanted: u32,
    ) -> Result<(), ConfigError> {
        if is_same_rate(offered, wanted) || kvm.scales_tsc() {
            return Ok(());
        }
        Err(ConfigError::ClockRate { wanted, offered })
    }
}
