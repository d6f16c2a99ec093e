//! Devices of a guest on the command line.

use limosa_host::api::{DiskSpec, NetworkSpec};
use std::str::FromStr;

/// `PATH` or `PATH,ro`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk(pub DiskSpec);

/// `TAP` or `TAP,mac=ADDRESS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Net(pub NetworkSpec);

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        if path.is_empty() {
            return Err("give the path of a raw file or of a block device".to_owned());
        }
        Ok(Self(DiskSpec {
            path: path.to_owned(),
            read_only,
        }))
    }
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (tap, rest) = match text.split_once(',') {
            Some((tap, rest)) => (tap, Some(rest)),
            None => (text, None),
        };
        let wrong = |rest| format!("'{rest}' is not mac=ADDRESS");
        let mac = match rest {
            None => None,
            Some(rest) => Some(rest.strip_prefix("mac=").ok_or_else(|| wrong(rest))?),
        };
        if tap.is_empty() {
            return Err("give the name of a tap device of this host".to_owned());
        }
        Ok(Self(NetworkSpec {
            tap: tap.to_owned(),
            mac: mac.map(str::to_owned),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        let disk = |text: &str| {
            let disk: Result<Disk, _> = text.parse();
            disk.map_or_else(
                |why| why,
                |Disk(disk)| format!("{} {}", disk.path, disk.read_only),
            )
        };
        assert_eq!(disk("/a/b.raw"), "/a/b.raw false");
        assert_eq!(disk("/a,b,ro"), "/a,b true");
        assert_eq!(
            disk(",ro"),
            "give the path of a raw file or of a block device"
        );
        let net = |text: &str| {
            let net: Result<Net, _> = text.parse();
            net.map_or_else(|why| why, |Net(net)| format!("{} {:?}", net.tap, net.mac))
        };
        assert_eq!(net("tap0"), "tap0 None");
        assert_eq!(
            net("tap0,mac=52:54:00:12:34:56"),
            "tap0 Some(\"52:54:00:12:34:56\")"
        );
        assert_eq!(net("tap0,52:54"), "'52:54' is not mac=ADDRESS");
        assert_eq!(net(""), "give the name of a tap device of this host");
    }
}
