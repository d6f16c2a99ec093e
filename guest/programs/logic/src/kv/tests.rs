//! Conversations of clients with a store, against what a map of the standard library answers.

use super::blocks::Block;
use super::store::Damage;
use super::*;
use crate::random::Random;
use std::collections::BTreeMap;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

/// A store of the test's own.
fn store(blocks: usize, slots: usize) -> Store<'static> {
    let blocks = vec![Block::ZERO; blocks].leak();
    let slots: Vec<Slot> = (0..slots).map(|_| Slot::default()).collect();
    let groups = vec![0; slots.len().div_ceil(GROUP_SLOTS)].leak();
    Store::new(slots.leak(), groups, Blocks::new(blocks), 7)
}

/// Sends all of that, in pieces of some bytes, with room for some bytes of answers at a time.
fn talk(
    session: &mut Session,
    store: &mut Store<'_>,
    input: &[u8],
    mut pieces: impl FnMut() -> (usize, usize),
) -> Vec<u8> {
    let mut answers = Vec::new();
    let mut at = 0;
    loop {
        let (bytes, room) = pieces();
        let end = input.len().min(at + bytes);
        let mut place = vec![0; room];
        let mut output = Output::new(&mut place);
        at += session.serve(store, &input[at..end], &mut output);
        let len = output.len();
        answers.extend(&place[..len]);
        if at == input.len() && len == 0 {
            return answers;
        }
    }
}

fn whole() -> (usize, usize) {
    (usize::MAX / 2, 1 << 20)
}

/// A request as clients send it.
fn request(arguments: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
    for argument in arguments {
        bytes.extend(format!("${}\r\n", argument.len()).bytes());
        bytes.extend(*argument);
        bytes.extend(b"\r\n");
    }
    bytes
}

#[test]
fn commands_are_answered() {
    let mut store = store(1000, 100);
    let mut session = Session::new();
    let mut check = |input: &str, expect: &str| {
        let input = input.replace('|', "\r\n");
        let answers = talk(&mut session, &mut store, input.as_bytes(), whole);
        let answers = String::from_utf8(answers).unwrap().replace("\r\n", "|");
        assert_eq!(answers, expect, "{input}");
    };
    check("*1|$4|PING|", "+PONG|");
    check("*2|$4|ping|$2|hi|", "$2|hi|");
    check("*2|$4|ECHO|$0||", "$0||");
    check("ping\n   \n|echo  you|", "+PONG|$3|you|");
    check("GET a|SET a 12|GET a|", "$-1|+OK|$2|12|");
    check("INCR a|INCR b|INCR b|GET b|", ":13|:1|:2|$1|2|");
    check(
        "SET n 9223372036854775807|INCR n|",
        "+OK|-ERR increment or decrement would overflow|",
    );
    check(
        "SET n -1|INCR n|SET n +1|INCR n|SET n 01|INCR n|",
        "+OK|:0|+OK|-ERR value is not an integer or out of range|+OK|-ERR value is not an integer or out of range|",
    );
    check("EXISTS a b c a|DBSIZE|", ":3|:3|");
    check("MGET a c b|", "*3|$2|13|$-1|$1|2|");
    check("DEL a c b|DBSIZE|", ":2|:1|");
    check("*3|$3|SET|$0||$0||GET x|*2|$3|GET|$0||", "+OK|$-1|$0||");
    check(
        "CONFIG GET save|COMMAND DOCS|SELECT 0|SELECT 1|",
        "*2|$4|save|$0||*0|+OK|-ERR DB index is out of range|",
    );
    check(
        "SET a 1 EX 5|SET a|FLUSHALL|CONFIG SET a b|",
        "-ERR syntax error: SET takes no options|-ERR wrong number of arguments for SET|-ERR unknown command|-ERR only CONFIG GET with one name is known|",
    );
    check("*0|*-1|*1|$4|PING|", "+PONG|");
    check(
        "INFO memory|",
        "$69|# limosa kv|keys:2|keys_max:100|used_memory:256|maxmemory:63936||",
    );
    let many = |count| format!("DEL{}|", " x".repeat(count));
    check(&many(127), ":0|");
    check(
        &many(128),
        "-ERR too many arguments: a request has at most 128|",
    );
    check("QUIT|PING|", "+OK|");
    assert!(session.is_over());
}

#[test]
fn what_breaks_the_protocol_ends_the_connection() {
    let check = |input: &str, expect: &str| {
        let mut store = store(1000, 100);
        let mut session = Session::new();
        let input = input.replace('|', "\r\n");
        let answers = talk(&mut session, &mut store, input.as_bytes(), whole);
        let answers = String::from_utf8(answers).unwrap();
        assert_eq!(
            answers,
            format!("-ERR Protocol error: {expect}\r\n"),
            "{input}"
        );
        assert!(session.is_over());
        session.reset(&mut store);
        assert!(!session.is_over());
        assert_eq!(store.blocks.used(), 0);
    };
    check("*a|", "invalid multibulk length");
    check("*1048577|", "invalid multibulk length");
    check("*99999999999999999999|", "invalid multibulk length");
    check("*1|a", "expected '$'");
    check("*1|$-1|", "invalid bulk length");
    check("*1|$536870913|", "invalid bulk length");
    check("*1|$1\n", "invalid bulk length");
    check("*2|$4|PINGxx", "expected the end of a line");
    check("SET a \"b c\"|", "quotes are not taken in a line");
    check(&"x".repeat(70_000), "too big inline request");
}

/// A conversation with texts of all lengths, and what a map answers.
fn conversation(random: &mut Random, requests: u32) -> (Vec<u8>, Vec<u8>) {
    let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    let (mut input, mut expect) = (Vec::new(), Vec::new());
    let bulk = |expect: &mut Vec<u8>, value: Option<&Vec<u8>>| match value {
        None => expect.extend(b"$-1\r\n"),
        Some(value) => {
            expect.extend(format!("${}\r\n", value.len()).bytes());
            expect.extend(value);
            expect.extend(b"\r\n");
        }
    };
    for _ in 0..requests {
        let mut key = || {
            let number = random.below(40);
            let filling = "k".repeat(number as usize * 7 % 150);
            format!("{number}{filling}").into_bytes()
        };
        let (one, other) = (key(), key());
        let mut value = vec![0; random.below(40).pow(2) as usize];
        value.fill_with(|| random.word() as u8);
        match random.below(6) {
            0 | 1 => {
                input.extend(request(&[b"SET", &one, &value]));
                expect.extend(b"+OK\r\n");
                model.insert(one, value);
            }
            2 => {
                input.extend(request(&[b"get", &one]));
                bulk(&mut expect, model.get(&one));
            }
            3 => {
                input.extend(request(&[b"MGET", &one, &other]));
                expect.extend(b"*2\r\n");
                bulk(&mut expect, model.get(&one));
                bulk(&mut expect, model.get(&other));
            }
            4 => {
                input.extend(request(&[b"DEL", &one]));
                let removed = u8::from(model.remove(&one).is_some());
                expect.extend(format!(":{removed}\r\n").bytes());
            }
            _ => {
                input.extend(request(&[b"EXISTS", &one, &other]));
                let there = [&one, &other].map(|key| u8::from(model.contains_key(key)));
                expect.extend(format!(":{}\r\n", there[0] + there[1]).bytes());
            }
        }
    }
    input.extend(b"DBSIZE\r\n");
    expect.extend(format!(":{}\r\n", model.len()).bytes());
    (input, expect)
}

#[test]
fn answers_are_those_of_a_map_however_the_bytes_come() {
    let mut random = Random::new(1, 0);
    for turn in 0..60 {
        let (input, expect) = conversation(&mut random, 150);
        let mut store = store(4000, 60 + turn * 4);
        let mut session = Session::new();
        let largest = [1 << 20, 3000, 40, 2][turn % 4];
        let mut sizes = Random::new(turn as u64, 1);
        let answers = talk(&mut session, &mut store, &input, || {
            let bytes = 1 + sizes.below(largest) as usize;
            (bytes, REPLY_BYTES_MAX + sizes.below(largest) as usize)
        });
        assert!(answers == expect, "turn {turn}");
        assert_eq!(session.take_requests(), 151);
        check_sound(&store);
        let keys: Vec<Vec<u8>> = (0..40)
            .map(|number: usize| format!("{number}{}", "k".repeat(number * 7 % 150)).into_bytes())
            .collect();
        for key in keys {
            talk(&mut session, &mut store, &request(&[b"DEL", &key]), whole);
        }
        assert!(store.is_empty());
        assert_eq!(store.blocks.used(), 0, "turn {turn}");
    }
}

fn check_sound(store: &Store<'_>) {
    let sound: Result<Vec<bool>, Damage> = (0..store.slot_count())
        .map(|index| store.check(index))
        .collect();
    let there = sound.unwrap().iter().filter(|&&there| there).count();
    assert_eq!(there, store.len() as usize);
    for group in 0..store.group_count() {
        assert_eq!(store.check_group(group), Ok(()));
    }
}

#[test]
fn no_bytes_make_it_panic_or_lose_memory() {
    let mut random = Random::new(2, 0);
    let mut store = store(600, 32);
    for turn in 0..3000_u64 {
        let (mut input, _) = conversation(&mut random, 4);
        for _ in 0..1 + random.below(6) {
            let at = random.below(input.len() as u64) as usize;
            let strange = b"*$-0123456789\r\n\"' \0\xffPGS";
            match random.below(3) {
                0 => input[at] = strange[random.below(strange.len() as u64) as usize],
                1 => input.insert(at, strange[random.below(strange.len() as u64) as usize]),
                _ => input.truncate(at.max(1)),
            }
        }
        let mut session = Session::new();
        let pieces = 1 + random.below(700) as usize;
        talk(&mut session, &mut store, &input, || {
            (pieces, REPLY_BYTES_MAX + pieces)
        });
        session.reset(&mut store);
        check_sound(&store);
        if turn % 50 == 49 {
            remove_all(&mut store);
            assert_eq!(store.blocks.used(), 0, "turn {turn}");
        }
    }
}

/// Removes what has whatever key.
fn remove_all(store: &mut Store<'_>) {
    while !store.is_empty() {
        let slot_count = store.slot_count();
        for index in 0..slot_count {
            if let Some(key) = store.shared_key(index) {
                assert!(store.remove(&key));
                store.blocks.release(key);
            }
        }
    }
}

#[test]
fn full_memory_is_an_answer_and_no_end() {
    let mut store = store(101, 200);
    let mut session = Session::new();
    let value = vec![b'v'; 52 + 60 * 10];
    let mut check = |input: &[&[u8]], expect: &[u8]| {
        let answers = talk(&mut session, &mut store, &request(input), whole);
        assert_eq!(
            String::from_utf8_lossy(&answers),
            String::from_utf8_lossy(expect)
        );
    };
    let full = b"-OOM the guest's memory is full\r\n";
    for key in [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8"] {
        check(&[b"SET", key, &value], b"+OK\r\n");
    }
    check(&[b"SET", b"9", &value], full);
    check(&[b"SET", b"9", b"small"], b"+OK\r\n");
    check(&[b"ECHO", &vec![b'x'; 1 << 20]], full);
    check(&[b"GET", b"9"], b"$5\r\nsmall\r\n");
    check(&[b"DEL", b"1"], b":1\r\n");
    check(&[b"SET", b"9", &value], b"+OK\r\n");
    // 8 values and keys of 11 and 1 blocks.
    assert_eq!(store.blocks.used(), 96);
    check_sound(&store);
}

#[test]
fn a_table_that_is_full_says_so() {
    let mut store = store(1000, 16);
    let mut session = Session::new();
    let mut answers = Vec::new();
    for key in 0..20 {
        let input = format!("INCR {key}\r\n");
        answers.extend(talk(&mut session, &mut store, input.as_bytes(), whole));
    }
    let answers = String::from_utf8(answers).unwrap();
    assert_eq!(answers.matches(":1\r\n").count(), 14);
    assert_eq!(answers.matches("-OOM").count(), 6);
    assert_eq!(store.blocks.used(), 28);
}

#[test]
fn a_value_that_is_being_sent_may_be_replaced() {
    let mut store = store(1000, 16);
    let value = vec![b'v'; 3000];
    let mut slow = Session::new();
    let mut other = Session::new();
    talk(
        &mut other,
        &mut store,
        &request(&[b"SET", b"k", &value]),
        whole,
    );
    let mut place = [0; 1000];
    let mut output = Output::new(&mut place);
    slow.serve(&mut store, b"GET k\r\nGET k\r\n", &mut output);
    let mut answers = output.bytes_so_far().to_vec();
    talk(
        &mut other,
        &mut store,
        &request(&[b"SET", b"k", b"new"]),
        whole,
    );
    answers.extend(talk(&mut slow, &mut store, b"GET k\r\n", whole));
    let expect = [b"$3000\r\n", &value[..], b"\r\n$3\r\nnew\r\n"].concat();
    assert!(answers == expect);
    assert_eq!(store.blocks.used(), 2);
}

#[test]
fn memory_is_divided_without_a_rest() {
    let check = |bytes: u64, expect: (usize, usize, usize)| {
        let Shape {
            slots,
            groups,
            blocks,
        } = Shape::of(bytes);
        assert_eq!((slots, groups, blocks), expect);
    };
    check(0, (0, 0, 0));
    check(1 << 20, (8192, 64, 13_248));
    check(1 << 30, (8 << 20, 64 << 10, 13_630_464));
    check(1 << 40, (8 << 30, 64 << 20, u32::MAX as usize));
}

#[test]
fn damage_is_seen() {
    let mut store = store(1000, 16);
    let mut session = Session::new();
    talk(&mut session, &mut store, b"SET key value\r\n", whole);
    check_sound(&store);
    let index = (0..16)
        .find(|&index| store.check(index) == Ok(true))
        .unwrap();
    store.blocks.damage(b"value");
    assert!(matches!(store.check(index), Err(Damage::Value(..))));
    assert_eq!(store.check_group(0), Err(store.check(index).unwrap_err()));
    store.blocks.damage(b"key");
    assert!(matches!(store.check(index), Err(Damage::Key(..))));
}
