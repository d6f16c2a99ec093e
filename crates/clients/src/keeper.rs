//! What a client asks, and what it has to be answered.
//!
//! All keys of a store are dealt out among its clients, so that each knows the newest value of each of its own: a
//! value is noise that key and version decide, and the version is kept here. A value that is lost, old or that of
//! another key is a wrong answer, and so is a count that was made twice or not at all.
//!
//! The noise is of a generator and not random: the same seed asks the same again. It cannot be written shorter, so
//! a store full of it is the worst case of any coding, as the noise of other guests is.

use crate::redis::{Answer, write_request};

/// Of a hundred requests, how many count; the others set and get values.
const COUNTS_PERCENT: u64 = 10;

/// The keys of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keys {
    /// How many there are.
    pub count: u32,
    /// How long each value is.
    pub value_bytes: usize,
}

impl Keys {
    /// Writes the request by which a key gets its first value.
    pub fn write_first(self, key: u32, request: &mut Vec<u8>) {
        self.write_set(key, 0, request);
    }

    fn write_set(self, key: u32, version: u32, request: &mut Vec<u8>) {
        let value = self.value(key, version);
        write_request(&[b"SET", name(key).as_bytes(), &value], request);
    }

    /// The value of a version of a key.
    fn value(self, key: u32, version: u32) -> Vec<u8> {
        let mut noise = Noise(u64::from(key) << 32 | u64::from(version));
        let words = self.value_bytes.div_ceil(8);
        let mut value = Vec::with_capacity(words * 8);
        for _ in 0..words {
            value.extend(noise.next().to_le_bytes());
        }
        value.truncate(self.value_bytes);
        value
    }
}

fn name(key: u32) -> String {
    format!("key-{key}")
}

/// The keys of one client, and the counter that it alone counts with.
#[derive(Debug)]
pub struct Keeper {
    keys: Keys,
    /// Its first key, and how far it is from one of its keys to the next.
    first: u32,
    step: u32,
    /// Versions of its keys.
    versions: Vec<u32>,
    counted: i64,
    sets_percent: u64,
    choices: Noise,
}

impl Keeper {
    /// That of the client `index` of `clients`, which share the keys; of a hundred of its requests so many set a
    /// value.
    ///
    /// # Panics
    /// If there are fewer keys than clients, or more than 90 of a hundred shall set.
    pub fn new(keys: Keys, (index, clients): (u32, u32), sets_percent: u8, seed: u64) -> Self {
        assert!(index < clients, "it is one of them");
        assert!(clients <= keys.count, "each client has a key");
        assert!(
            u64::from(sets_percent) + COUNTS_PERCENT <= 100,
            "some requests count"
        );
        let own = (keys.count - index).div_ceil(clients);
        Self {
            keys,
            first: index,
            step: clients,
            versions: vec![0; own as usize],
            counted: 0,
            sets_percent: u64::from(sets_percent),
            choices: Noise(seed ^ u64::from(index) << 48),
        }
    }

    /// Writes the next request; what it has to be answered when all those before it were carried out.
    pub fn next(&mut self, request: &mut Vec<u8>) -> Answer {
        let choice = self.choices.next();
        let percent = choice % 100;
        if percent < COUNTS_PERCENT {
            write_request(
                &[b"INCR", format!("count-{}", self.first).as_bytes()],
                request,
            );
            self.counted += 1;
            return Answer::Number(self.counted);
        }
        let own = (choice >> 32) as usize % self.versions.len();
        let key = self.first + own as u32 * self.step;
        if percent < COUNTS_PERCENT + self.sets_percent {
            self.versions[own] += 1;
            self.keys.write_set(key, self.versions[own], request);
            return Answer::Word("OK".to_owned());
        }
        write_request(&[b"GET", name(key).as_bytes()], request);
        Answer::Value(Some(self.keys.value(key, self.versions[own])))
    }
}

/// Numbers that look random. [Steele14]
#[derive(Debug)]
struct Noise(u64);

impl Noise {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::{self, BufRead};

    const KEYS: Keys = Keys {
        count: 7,
        value_bytes: 21,
    };

    /// The words of the next request; `None` behind the last one.
    pub(crate) fn words_from(reader: &mut impl BufRead) -> io::Result<Option<Vec<Vec<u8>>>> {
        let Some(count) = number(reader)? else {
            return Ok(None);
        };
        let word = |_| {
            let mut word = vec![0; number(reader)?.unwrap_or(0) + 2];
            reader.read_exact(&mut word)?;
            word.truncate(word.len() - 2);
            Ok(word)
        };
        (0..count).map(word).collect::<io::Result<_>>().map(Some)
    }

    /// The number behind a sign, in a line of its own.
    fn number(reader: &mut impl BufRead) -> io::Result<Option<usize>> {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        Ok(Some(line[1..].trim_end().parse().unwrap()))
    }

    /// A store as it has to be.
    pub(crate) fn answer(store: &mut BTreeMap<Vec<u8>, Vec<u8>>, words: &[Vec<u8>]) -> Answer {
        match words[0].as_slice() {
            b"SET" => {
                store.insert(words[1].clone(), words[2].clone());
                Answer::Word("OK".to_owned())
            }
            b"GET" => Answer::Value(store.get(&words[1]).cloned()),
            _ => {
                let text = store.get(&words[1]).map_or(&b"0"[..], Vec::as_slice);
                let next = String::from_utf8_lossy(text).parse::<i64>().unwrap() + 1;
                store.insert(words[1].clone(), next.to_string().into_bytes());
                Answer::Number(next)
            }
        }
    }

    /// What it answers to the request in these bytes.
    fn answer_bytes(store: &mut BTreeMap<Vec<u8>, Vec<u8>>, mut request: &[u8]) -> Answer {
        let words = words_from(&mut request).unwrap().unwrap();
        assert!(request.is_empty(), "it is one request");
        answer(store, &words)
    }

    #[test]
    fn a_store_that_does_what_it_shall_answers_what_is_expected() {
        let mut store = BTreeMap::new();
        let mut request = Vec::new();
        for key in 0..KEYS.count {
            request.clear();
            KEYS.write_first(key, &mut request);
            answer_bytes(&mut store, &request);
        }
        let mut keepers: Vec<Keeper> = (0..3)
            .map(|index| Keeper::new(KEYS, (index, 3), 40, 9))
            .collect();
        let mut kinds = [0; 3];
        for turn in 0..3000 {
            request.clear();
            let expected = keepers[turn % 3].next(&mut request);
            let answered = answer_bytes(&mut store, &request);
            answered.expect(&expected).unwrap();
            kinds[match answered {
                Answer::Word(_) => 0,
                Answer::Value(_) => 1,
                Answer::Number(_) => 2,
            }] += 1;
        }
        assert!(
            kinds[0] > 1000 && kinds[1] > 1300 && kinds[2] > 200,
            "{kinds:?}"
        );
        assert_eq!(store.len(), 7 + 3);
        // An old value is a wrong answer.
        let old = Answer::Value(Some(KEYS.value(3, 1)));
        let said = old.expect(&Answer::Value(Some(KEYS.value(3, 2))));
        assert!(
            said.unwrap_err()
                .to_string()
                .starts_with("a wrong answer: 21 bytes")
        );
    }

    #[test]
    fn clients_share_all_keys() {
        let own = |index| Keeper::new(KEYS, (index, 3), 0, 0).versions.len();
        assert_eq!([own(0), own(1), own(2)], [3, 2, 2]);
    }
}
