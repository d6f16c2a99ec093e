//! Who is given pieces, and what an operator and the law change about it. Pieces are sent when a test says
//! so; nothing here carries a page.

use super::*;
use crate::journal::Machine;
use crate::policy::Limits;
use crate::source::rounds::Round;
use crate::source::{Piece, SourceConfig, SourceEvent, Writers};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use limosa_pages::{ByteCount, PageCount};

const MEMORY: u64 = 1 << 21;

fn fixed(number: u8) -> Streams {
    Streams::fixed(number).unwrap()
}

/// A source in its bulk round of pages with content, eight streams open.
fn copying(streams: Streams) -> (Source, Vec<SourceAction>) {
    let (memory, chunk) = (PageCount::new(MEMORY), PageCount::new(512));
    let mut source = Source::new(SourceConfig {
        streams: 8,
        limits: Limits {
            streams,
            ..Limits::default()
        },
        ..SourceConfig::sample(memory, chunk)
    });
    source.state = State::Rounds;
    let dirty = vec![512; (MEMORY / 512) as usize];
    let actions = source.harvested(
        Timestamp::ZERO,
        0,
        (&dirty, PageCount::ZERO),
        &Writers::default(),
    );
    (source, actions)
}

/// What is sent, and by whom; clears are confirmed at once.
fn given(source: &mut Source, actions: Vec<SourceAction>) -> Vec<(Piece, u8)> {
    let mut given = Vec::new();
    let mut actions: alloc::collections::VecDeque<_> = actions.into();
    while let Some(action) = actions.pop_front() {
        match action {
            SourceAction::Clear(piece) => {
                actions.extend(source.handle(Timestamp::ZERO, SourceEvent::Cleared(piece)));
            }
            SourceAction::SendPiece { piece, stream } | SourceAction::Push { piece, stream } => {
                given.push((piece, stream));
            }
            _ => {}
        }
    }
    given
}

fn sent_whole(piece: Piece) -> SentPiece {
    SentPiece {
        pages: piece.range.count,
        bytes: ByteCount::new(piece.range.bytes().get()),
        ..SentPiece::default()
    }
}

/// Reports one piece after the other as sent, the oldest first; the streams that were given the next
/// ones, until there are so many.
fn streams_of_next(source: &mut Source, mut open: Vec<(Piece, u8)>, many: usize) -> String {
    let mut streams = String::new();
    while streams.len() < many {
        let (piece, stream) = open.remove(0);
        let event = SourceEvent::Sent {
            piece,
            stream,
            sent: sent_whole(piece),
        };
        let actions = source.handle(Timestamp::ZERO, event);
        let next = given(source, actions);
        next.iter()
            .for_each(|(_, stream)| streams.push_str(&format!("{stream}")));
        open.extend(next);
    }
    streams
}

fn set(source: &mut Source, streams: Streams) -> Vec<SourceAction> {
    let limits = Limits {
        streams,
        ..*source.limits()
    };
    source.handle(Timestamp::ZERO, SourceEvent::Set(limits))
}

#[test]
fn pieces_go_to_the_streams_in_use() {
    let (mut source, actions) = copying(fixed(3));
    let open = given(&mut source, actions);
    assert_eq!(open.len(), 6);
    assert_eq!(streams_of_next(&mut source, open, 6), "012012");
}

#[test]
fn the_number_changes_in_the_middle_of_a_round() {
    let (mut source, actions) = copying(fixed(2));
    let mut open = given(&mut source, actions);
    let actions = set(&mut source, fixed(5));
    let more = given(&mut source, actions);
    // Three streams more, two pieces each, at once.
    assert_eq!(more.len(), 6);
    assert!(more.iter().all(|(_, stream)| (2..5).contains(stream)));
    open.extend(more);
    assert!(set(&mut source, fixed(1)).is_empty());
    // What they have they send, but get no more.
    assert_eq!(streams_of_next(&mut source, open, 4), "0000");
    assert_eq!(source.streams_in_use(), 1);
}

#[test]
fn more_than_are_open_are_not_used() {
    let (mut source, _) = copying(fixed(2));
    set(&mut source, fixed(16));
    assert_eq!((source.streams_in_use(), source.streams_open()), (8, 8));
}

#[test]
fn the_law_goes_on_from_what_the_operator_had() {
    let (mut source, _) = copying(fixed(5));
    set(&mut source, Streams::AUTO);
    assert_eq!(source.streams_in_use(), 5);
}

#[test]
fn a_round_that_is_given_up_is_not_gone_on_with() {
    let (mut source, _) = copying(fixed(1));
    source.state = State::Pausing;
    assert!(set(&mut source, fixed(4)).is_empty());
}

/// With the law, over a link on which each stream carries as much as the others, and all of the
/// pieces are in flight at once; how many streams are in use after so many pieces.
fn climbed(mut source: Source, actions: Vec<SourceAction>, pieces: u64, zeros: bool) -> u8 {
    let mut open = given(&mut source, actions);
    let mut now = 0;
    for _ in 0..pieces {
        now += 40_000_000 / u64::from(source.streams_in_use());
        let (piece, stream) = open.remove(0);
        let mut sent = sent_whole(piece);
        if zeros {
            sent.zero_pages = sent.pages;
        }
        let event = SourceEvent::Sent {
            piece,
            stream,
            sent,
        };
        let actions = source.handle(Timestamp::from_nanos(now), event);
        open.extend(given(&mut source, actions));
    }
    source.streams_in_use()
}

#[test]
fn the_law_is_asked_while_the_guest_runs_here_or_there() {
    let (source, actions) = copying(Streams::AUTO);
    assert_eq!(climbed(source, actions, 500, false), 8);
    let (source, actions) = copying(Streams::AUTO);
    assert_eq!(climbed(source, actions, 500, true), 2);

    let pushing = |state| {
        let (mut source, _) = copying(Streams::AUTO);
        let dirty = vec![512; (MEMORY / 512) as usize];
        source.state = state;
        let config = &source.config;
        source.round = Some(Round::push(1, &dirty, config, Timestamp::ZERO));
        let actions = source.next_pieces();
        climbed(source, actions, 500, false)
    };
    assert_eq!(pushing(State::Serving), 8);
    assert_eq!(pushing(State::LastRound { prepared: false }), 2);
}

/// Whoever carried something of a round ends it, in use or not; who did not is not waited for.
#[test]
fn a_barrier_is_sent_by_each_stream_that_carried_something() {
    let (mut source, actions) = copying(fixed(2));
    let mut open = given(&mut source, actions);
    let actions = set(&mut source, fixed(4));
    open.extend(given(&mut source, actions));
    set(&mut source, fixed(1));
    let mut barriers = Vec::new();
    while let Some((piece, stream)) = open.pop() {
        let sent = sent_whole(piece);
        let event = SourceEvent::Sent {
            piece,
            stream,
            sent,
        };
        let mut actions = source.handle(Timestamp::ZERO, event);
        while let Some(action) = actions.pop() {
            match action {
                SourceAction::Clear(piece) => {
                    actions.extend(source.handle(Timestamp::ZERO, SourceEvent::Cleared(piece)));
                }
                SourceAction::SendPiece { piece, stream } => open.push((piece, stream)),
                SourceAction::SendBarrier {
                    stream, streams, ..
                } => barriers.push((stream, streams)),
                _ => {}
            }
        }
    }
    barriers.sort_unstable();
    assert_eq!(barriers, [(0, 4), (1, 4), (2, 4), (3, 4)]);
}
