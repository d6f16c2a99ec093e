//! Colours that stay apart for people who see fewer of them, and on grey paper. [Okabe08]

use limosa_engine::policy::Mode;

/// Red, green, blue.
pub(super) type Colour = (u8, u8, u8);

/// Of text and axes.
pub(super) const INK: Colour = (60, 60, 60);
/// Of lines that only guide the eye.
pub(super) const GRID: Colour = (221, 221, 221);

/// Of a technique, the same in all charts.
pub(super) const fn technique(mode: Mode) -> Colour {
    match mode {
        Mode::StopAndCopy => (85, 85, 85),
        Mode::Demand => (204, 121, 167),
        Mode::PostCopy => (213, 94, 0),
        Mode::PreCopy => (0, 114, 178),
        Mode::Hybrid => (0, 158, 115),
        Mode::Auto => (230, 159, 0),
    }
}
