//! When one side of a queue calls the other (virtio 1.2, section 2.7.10): each says of which entry it wants to
//! hear, and entries are counted modulo 2^16.

/// Whether the entry `wanted` is among those from `before` up to, not including, `now`.
#[inline]
#[must_use]
pub const fn is_among(wanted: u16, before: u16, now: u16) -> bool {
    wanted.wrapping_sub(before) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wanted_entry_is_found_across_the_end_of_numbers() {
        let starts = [0_u16, 1, 32_767, 32_768, 65_000, 65_535];
        for before in starts {
            for count in [0_u16, 1, 2, 255, 256] {
                let now = before.wrapping_add(count);
                let mut among = [false; 600];
                for entry in 0..count {
                    among[usize::from(entry) + 300] = true;
                }
                for (place, expect) in (0_u16..).zip(among) {
                    let wanted = before.wrapping_add(place).wrapping_sub(300);
                    assert_eq!(
                        is_among(wanted, before, now),
                        expect,
                        "{wanted} {before} {now}"
                    );
                }
            }
        }
    }
}
