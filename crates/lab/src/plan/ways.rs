//! The ways of a matrix: techniques of limosa with their streams and coding, or variants of QEMU with
//! the downtime that they aim at.

use super::text::Text;
use super::{MatrixTable, Vmm, parsed, rounds_default};
use crate::backing::Backing;
use crate::qemu::QemuWay;
use crate::values::{Milliseconds, OrNone};
use limosa_engine::policy::Mode;
use limosa_engine::streams::Streams;
use limosa_host::api::{Compression, Deferral, PushOrder, Throttling, TrackerKind};

/// The longest row's name that still fits into a table.
const ROW_CHARACTERS_MAX: usize = 60;

/// One way to move a guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) technique: Mode,
    pub(super) streams: Streams,
    pub(super) compress: Compression,
    pub(super) qemu: Option<QemuWay>,
}

impl MatrixTable {
    /// Its ways, those that differ by technique or variant next to each other.
    pub(super) fn ways(&self) -> Result<Vec<Way>, String> {
        if let Some(row) = &self.row
            && (row.trim().is_empty() || row.chars().count() > ROW_CHARACTERS_MAX)
        {
            return Err(format!(
                "row is a name of 1 to {ROW_CHARACTERS_MAX} characters"
            ));
        }
        match self.vmm {
            Vmm::Limosa => self.ways_of_limosa(),
            Vmm::Qemu => self.ways_of_qemu(),
        }
    }

    fn ways_of_limosa(&self) -> Result<Vec<Way>, String> {
        let foreign = [
            ("variants", self.variants.is_some()),
            ("downtime_limits", self.downtime_limits.is_some()),
            ("cancel_after", self.cancel_after.is_some()),
        ];
        if let Some((key, _)) = foreign.into_iter().find(|(_, is_there)| *is_there) {
            return Err(format!("{key} is for a matrix with vmm = \"qemu\""));
        }
        let techniques = self.techniques.as_ref();
        let techniques = filled("techniques", techniques.ok_or("techniques is missing")?)?;
        // Two as ever, so that what was measured without a word about it stays comparable.
        let usual = [Streams::fixed(2).expect("two are in range")];
        let streams = self.streams.as_deref().unwrap_or(&usual);
        let streams = filled("streams", streams)?;
        let compress = self.compress.as_deref().unwrap_or(&[Compression::Auto]);
        let compress = filled("compress", compress)?;
        let mut ways = Vec::new();
        for &streams in streams {
            for &compress in compress {
                ways.extend(techniques.iter().map(|&technique| Way {
                    technique,
                    streams,
                    compress,
                    qemu: None,
                }));
            }
        }
        Ok(ways)
    }

    fn ways_of_qemu(&self) -> Result<Vec<Way>, String> {
        let ours = [
            ("techniques", self.techniques.is_some()),
            ("streams", self.streams.is_some()),
            ("compress", self.compress.is_some()),
        ];
        if let Some((key, _)) = ours.into_iter().find(|(_, is_there)| *is_there) {
            return Err(format!("{key} is limosa's: QEMU has variants"));
        }
        let is_ours = self.pages != [Backing::default()]
            || self.dirty_trackers != [TrackerKind::default()]
            || self.push_orders != [PushOrder::default()]
            || self.throttles != [Throttling::default()]
            || self.defers != [Deferral::default()];
        if is_ours {
            let keys = "pages, dirty_trackers, push_orders, throttles and defers";
            return Err(format!("{keys} are limosa's: QEMU has variants"));
        }
        if self.tls != [false] {
            return Err("tls is limosa's: leave it to QEMU".to_owned());
        }
        let has_deadline = |one: &Text<OrNone<Milliseconds>>| one.0 != OrNone::None;
        if self.deadlines.iter().any(has_deadline) || self.rounds != rounds_default() {
            return Err("deadlines and rounds are limosa's: QEMU has cancel_after".to_owned());
        }
        if self.vcpus != [1] {
            return Err("a guest of QEMU has one vCPU".to_owned());
        }
        let variants = self.variants.as_ref();
        let variants = filled("variants", variants.ok_or("variants is missing")?)?;
        let usual = [Text(parsed::<Milliseconds>("300ms"))];
        let limits = self.downtime_limits.as_deref().unwrap_or(&usual);
        let limits = filled("downtime_limits", limits)?;
        let cancel_after = self.cancel_after.as_ref();
        let cancel_after = cancel_after.map_or_else(|| parsed("30s"), |text| text.0);
        let mut ways = Vec::new();
        for limit in limits {
            let downtime_limit_ms = whole_milliseconds(limit.0)?;
            ways.extend(variants.iter().map(|&variant| Way {
                technique: variant.technique(),
                streams: Streams::fixed(variant.streams()).expect("few"),
                compress: variant.compress(),
                qemu: Some(QemuWay {
                    variant,
                    downtime_limit_ms,
                    cancel_after_ms: cancel_after.get() as u64,
                }),
            }));
        }
        Ok(ways)
    }
}

fn filled<'a, T>(name: &str, list: &'a [T]) -> Result<&'a [T], String> {
    if list.is_empty() {
        return Err(format!("{name} is empty"));
    }
    Ok(list)
}

/// As QEMU takes it: 1 ms to 2000 s.
fn whole_milliseconds(limit: Milliseconds) -> Result<u32, String> {
    let value = limit.get();
    if !(1.0..=2_000_000.0).contains(&value) || value.fract() != 0.0 {
        return Err(format!(
            "downtime_limits has {value} ms: QEMU takes whole milliseconds, 1 to 2000000"
        ));
    }
    Ok(value as u32)
}
