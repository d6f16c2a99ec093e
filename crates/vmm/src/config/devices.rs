//! The devices in a machine's configuration.

use super::{ConfigError, is_plain};
use limosa_os::tap;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Most disks and networks of a machine together; each has an interrupt line of its own, and the last
/// three are those of the random numbers, the console and the balloon.
pub const DEVICES_MAX: usize = 7;
/// Longest path of a disk.
pub const PATH_BYTES_MAX: usize = 1024;

/// A disk: a raw file or a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Where it is, absolute; the same on each host.
    pub path: String,
    /// The guest only reads it.
    pub read_only: bool,
    /// Its size, once a guest has seen it.
    pub bytes: Option<u64>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// The tap device behind it; the same name on each host.
    pub tap: String,
    /// Its address.
    pub mac: Mac,
}

/// An address of Ethernet, of one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address that a machine of that name has for its interface with that number, unless it is
    /// given one: the same each time, locally administered, and with the prefix of virtual machines.
    pub fn of(name: &str, number: usize) -> Self {
        let hash = xxhash_rust::xxh3::xxh3_64_with_seed(name.as_bytes(), number as u64);
        let [a, b, c, ..] = hash.to_le_bytes();
        Self([0x52, 0x54, 0, a, b, c])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no address such as 52:54:00:12:34:56");
        let parts: Vec<&str> = text.split(':').collect();
        let mut bytes = [0; 6];
        if parts.len() != bytes.len() {
            return Err(wrong());
        }
        for (byte, part) in bytes.iter_mut().zip(parts) {
            let is_pair = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| is_pair)
                .ok_or_else(wrong)?;
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!("'{text}' is not the address of one interface"));
        }
        Ok(Self(bytes))
    }
}

/// Checks the limits of all devices of a machine.
pub(super) fn check(disks: &[DiskConfig], networks: &[NetworkConfig]) -> Result<(), ConfigError> {
    let count = disks.len() + networks.len();
    if count > DEVICES_MAX {
        return Err(ConfigError::Devices { count });
    }
    for disk in disks {
        let is_path = disk.path.starts_with('/') && !disk.path.contains('\0');
        if !is_path || disk.path.len() > PATH_BYTES_MAX {
            return Err(ConfigError::DiskPath {
                path: disk.path.chars().take(80).collect(),
            });
        }
        let is_same = |other: &&DiskConfig| other.path == disk.path;
        if disks.iter().filter(is_same).count() > 1 {
            return Err(ConfigError::SameDevice {
                name: disk.path.clone(),
            });
        }
    }
    for network in networks {
        let tap = &network.tap;
        let fits = (1..=tap::NAME_BYTES_MAX).contains(&tap.len());
        if !fits || !tap.bytes().all(is_plain) || tap.starts_with('.') {
            return Err(ConfigError::Tap {
                tap: tap.chars().take(80).collect(),
            });
        }
        let is_same = |other: &&NetworkConfig| &other.tap == tap || other.mac == network.mac;
        if networks.iter().filter(is_same).count() > 1 {
            return Err(ConfigError::SameDevice { name: tap.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let check = |text: &str, expect: &str| {
            let shown = text
                .parse::<Mac>()
                .map_or_else(|why| why, |mac| mac.to_string());
            assert_eq!(shown, expect);
        };
        check("52:54:00:Ab:cd:01", "52:54:00:ab:cd:01");
        for text in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:1",
            "52:54:00:ab:cd:+1",
        ] {
            check(
                text,
                &format!("'{text}' is no address such as 52:54:00:12:34:56"),
            );
        }
        let text = "01:00:5e:00:00:01";
        check(
            text,
            &format!("'{text}' is not the address of one interface"),
        );
        let own = Mac::of("web", 0);
        assert_eq!(own.to_string().parse(), Ok(own));
        assert_ne!(own, Mac::of("web", 1));
    }

    #[test]
    fn limits_hold() {
        let disk = |path: &str| DiskConfig {
            path: path.to_owned(),
            read_only: false,
            bytes: None,
        };
        let network = |tap: &str| NetworkConfig {
            tap: tap.to_owned(),
            mac: Mac::of(tap, 0),
        };
        let check = |disks: &[&str], taps: &[&str], expect: &str| {
            let disks: Vec<_> = disks.iter().map(|path| disk(path)).collect();
            let networks: Vec<_> = taps.iter().map(|tap| network(tap)).collect();
            let text = super::check(&disks, &networks)
                .map_or_else(|error| error.to_string(), |()| "ok".to_owned());
            assert_eq!(text, expect);
        };
        check(&["/a", "/b"], &["tap0", "tap1"], "ok");
        check(&["a"], &[], "'a' is no absolute path of a disk");
        check(&["/a", "/a"], &[], "'/a' is given twice");
        check(&[], &["tap0", "tap0"], "'tap0' is given twice");
        check(&[], &["a/b"], "'a/b' is no name of a network interface");
        check(
            &["/a"; 8],
            &[],
            "8 disks and networks are too many: a machine has at most 7",
        );
    }
}
