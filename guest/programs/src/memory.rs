//! The five functions that compiled code calls by name, since there is no C library.
//!
//! They are string instructions on purpose: a loop could be turned by the compiler into a call of
//! the very function that it is the body of.

use core::arch::asm;

/// # Safety
/// As in C: both areas are valid for so many bytes and do not overlap.
// SAFETY: no library brings another function of this name.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the areas; the direction flag is clear in compiled code.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C: both areas are valid for so many bytes.
// SAFETY: no library brings another function of this name.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= bytes {
        // SAFETY: copying upwards never overwrites what is still to be read, since the target
        // starts before the source or behind its end.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the target starts within the source, so `bytes` is not zero and copying downwards
    // from the last byte is right; the flag is cleared again before anybody relies on it.
    unsafe {
        let last = bytes - 1;
        asm!("std", "rep movsb", "cld",
            inout("rdi") to.wrapping_add(last) => _, inout("rsi") from.wrapping_add(last) => _,
            inout("rcx") bytes => _, options(nostack));
    }
    to
}

/// # Safety
/// As in C: the area is valid for so many bytes.
// SAFETY: no library brings another function of this name.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the area.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C: both areas are valid for so many bytes.
// SAFETY: no library brings another function of this name.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    let (above, below): (u8, u8);
    // SAFETY: the caller vouches for the areas. The comparison sets the flags first, so that no
    // bytes are equal bytes.
    unsafe {
        asm!("cmp eax, eax", "repe cmpsb", "seta {above}", "setb {below}",
            above = out(reg_byte) above, below = out(reg_byte) below,
            inout("rsi") one => _, inout("rdi") other => _, inout("rcx") bytes => _,
            in("eax") 0, options(nostack, readonly));
    }
    i32::from(above) - i32::from(below)
}

/// # Safety
/// As in C: both areas are valid for so many bytes.
// SAFETY: no library brings another function of this name.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, bytes: usize) -> i32 {
    // SAFETY: the obligations are the same.
    unsafe { memcmp(one, other, bytes) }
}

/// Precompiled parts of the core library name it; nothing unwinds here, so nothing calls it.
// SAFETY: no library brings another function of this name.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
