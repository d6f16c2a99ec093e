//! What a machine needs of a host, compared before anything is made: features of the processor, registers,
//! clock, disks, interfaces.

use super::{ConfigError, VmConfig, is_same_rate};
use crate::cpu::{self, CpuidLeaf};
use crate::virtio;
use limosa_os::kvm::{Kvm, KvmError};

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
                differences.extend(self.check_features(&kvm).err());
                differences.extend(self.check_registers(&kvm).err());
                differences.extend(self.compare_clock(&kvm).err());
            }
            Err(error) => differences.push(error.into()),
        }
        differences.extend(virtio::lacking(self).into_iter().map(ConfigError::from));
        differences
    }

    pub(crate) fn check_features(&self, kvm: &Kvm) -> Result<(), ConfigError> {
        let offered = cpu::machine_table(kvm, self.platform)?;
        let Some(wanted) = &self.cpuid else {
            let (_, features) = cpu::model_table(self.model, &offered);
            return if features.is_empty() {
                Ok(())
            } else {
                let model = self.model;
                Err(ConfigError::Model { model, features })
            };
        };
        let features = cpu::missing_features(wanted, &offered);
        if features.is_empty() {
            Ok(())
        } else {
            Err(ConfigError::Features { features })
        }
    }

    /// The features that a guest sees: those that it has seen, or those of its model here.
    pub(crate) fn take_features(&mut self, kvm: &Kvm) -> Result<Vec<CpuidLeaf>, KvmError> {
        match self.cpuid.take() {
            Some(table) => Ok(table),
            None => {
                let offered = cpu::machine_table(kvm, self.platform)?;
                Ok(cpu::model_table(self.model, &offered).0)
            }
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
