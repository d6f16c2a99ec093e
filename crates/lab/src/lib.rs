//! Experiments: what is measured, in which order, where results are kept and how they are shown.
//!
//! ```text
//!  plan ──▶ schedule ──▶ runs, made elsewhere ──▶ store ──▶ csv, report
//! ```
//!
//! A [`plan`] is a file that asks a question and names a matrix of cells; a [`schedule`] mixes their
//! runs; a [`store`] keeps each result as soon as it is there, so that whatever ends the program
//! costs one run; [`csv`] and [`report`] read nothing but the store. A [`record::MoveRecord`] is one
//! measured move, whoever measured it.
//!
//! Invariants: results of different plans, or real and simulated ones, never meet in one directory;
//! what was not measured stays absent in every form.
//!
//! Deliberately absent: daemons, guests and clocks. Whoever makes the moves is above this crate.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod backing;
pub mod clients;
pub mod csv;
pub mod machine;
pub mod plan;
pub mod qemu;
pub mod record;
pub mod report;
pub mod rows;
#[cfg(test)]
mod sample;
pub mod schedule;
pub mod statistics;
pub mod store;
pub mod summary;
pub mod values;
pub mod workload;
