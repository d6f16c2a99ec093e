//! The guest programs of this repository as ELF images, embedded so that one binary is enough.
//!
//! The build script builds `guest/programs` with a cargo of its own. How a guest starts and speaks
//! to its monitor is said in `docs/micro-guests.md`; the structures are in `limosa-micro-abi`.
//!
//! Deliberately absent: loading and running. A monitor does that, with any image.
#![no_std]

/// Rewrites pages that prove themselves.
pub static WRITER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/writer"));

/// Only beats.
pub static IDLE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/idle"));

/// Reads much, writes little, checks its results.
pub static COMPUTE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/compute"));

/// Keeps values for clients that speak as redis does.
pub static KV: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kv"));

/// What a PVH loader enters, for images that other monitors load: no program of its own, but the way
/// from there to one of them. `limosa_micro_abi::pvh` says what it finds where.
pub static PVH: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pvh"));

/// Names of all programs, for help texts.
pub const NAMES: [&str; 4] = ["writer", "idle", "compute", "kv"];

/// The image of the program with that name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static [u8]> {
    match name {
        "writer" => Some(WRITER),
        "idle" => Some(IDLE),
        "compute" => Some(COMPUTE),
        "kv" => Some(KV),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_micro_abi::memory_map::{HEAP_ALIGNMENT, IMAGE_START};

    fn word(image: &[u8], at: usize) -> u64 {
        let bytes = image[at..at + 8].try_into();
        u64::from_le_bytes(bytes.expect("eight bytes are eight bytes"))
    }

    fn half(image: &[u8], at: usize) -> u16 {
        u16::from_le_bytes([image[at], image[at + 1]])
    }

    #[test]
    fn images_are_static_and_lie_where_guests_lie() {
        const FIXED_ADDRESS: u16 = 2;
        const X86_64: u16 = 62;
        const LOAD: u16 = 1;
        for name in NAMES {
            let image = by_name(name).expect("every name has its program");
            assert_eq!(&image[..6], b"\x7fELF\x02\x01", "{name}");
            assert_eq!((half(image, 16), half(image, 18)), (FIXED_ADDRESS, X86_64));
            assert_eq!(word(image, 24), IMAGE_START, "entry of {name}");
            let headers = word(image, 32) as usize;
            for index in 0..usize::from(half(image, 56)) {
                let header = &image[headers + index * 56..];
                assert_eq!(half(header, 0), LOAD, "{name} is only loaded, not linked");
                let (start, bytes) = (word(header, 16), word(header, 40));
                assert!(start >= IMAGE_START);
                assert!(
                    start + bytes <= IMAGE_START + HEAP_ALIGNMENT,
                    "{name} is small"
                );
            }
        }
    }

    #[test]
    fn what_other_monitors_enter_is_one_piece_at_its_address() {
        use limosa_micro_abi::pvh;
        assert_eq!(word(PVH, 24), pvh::START);
        assert_eq!(half(PVH, 56), 1, "one segment");
        let header = &PVH[word(PVH, 32) as usize..];
        assert_eq!((half(header, 0), word(header, 16)), (1, pvh::START));
        assert!(word(header, 40) <= pvh::GDT - pvh::START);
        assert!(NAMES.iter().all(|name| *name != "pvh"), "no program");
    }

    #[test]
    fn programs_leave_room_for_it() {
        use limosa_micro_abi::pvh;
        for name in NAMES {
            let image = by_name(name).expect("every name has its program");
            let headers = word(image, 32) as usize;
            for index in 0..usize::from(half(image, 56)) {
                let header = &image[headers + index * 56..];
                assert!(word(header, 16) + word(header, 40) <= pvh::START, "{name}");
            }
        }
    }

    #[test]
    fn other_names_have_no_program() {
        assert_eq!(by_name("redis"), None);
        assert_eq!(by_name(""), None);
    }
}
