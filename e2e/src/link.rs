//! A link between two hosts that a test can cut or bring to a stand.
//!
//! ```text
//!  source daemon ─▶ Link ─▶ target daemon        each connection: two threads that pass bytes on
//! ```
//!
//! Cut, all connections end and new ones are closed at once. Standing, everybody may connect and
//! send, and nothing arrives until it flows again: then all of it does, however late.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    Flows,
    Stands,
    Cut,
}

#[derive(Debug)]
struct State {
    traffic: Traffic,
    is_over: bool,
    /// Both ends of each connection, by number.
    connections: Vec<(u64, [TcpStream; 2])>,
    next: u64,
}

#[derive(Debug)]
struct Shared {
    target: String,
    state: Mutex<State>,
    changed: Condvar,
}

/// A link to one daemon.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Link {
    /// A link that leads to the daemon at `target`.
    ///
    /// # Panics
    /// If the kernel gives no socket or thread.
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            state: Mutex::new(State {
                traffic: Traffic::Flows,
                is_over: false,
                connections: Vec::new(),
                next: 0,
            }),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if accepting.state().is_over {
                    return;
                }
                if let Err(error) = accepting.connect(near) {
                    println!("a connection through the link failed: {error}");
                }
            }
        });
        Self {
            address,
            shared,
            acceptor: Some(acceptor),
        }
    }

    /// Where a source is to connect to.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Ends all connections, and new ones until it is mended.
    pub fn cut(&self) {
        self.shared.turn(Traffic::Cut);
        let connections = std::mem::take(&mut self.shared.state().connections);
        connections
            .iter()
            .flat_map(|(_, ends)| ends)
            .for_each(close);
    }

    /// Passes nothing on until it is mended or cut.
    pub fn stand(&self) {
        self.shared.turn(Traffic::Stands);
    }

    /// Passes bytes again: what came meanwhile, and what comes.
    pub fn mend(&self) {
        self.shared.turn(Traffic::Flows);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.cut();
        // The acceptor waits for a connection.
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().expect("the acceptor does not panic");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, traffic: Traffic) {
        self.state().traffic = traffic;
        self.changed.notify_all();
    }

    fn connect(self: &Arc<Self>, near: TcpStream) -> io::Result<()> {
        if self.state().traffic == Traffic::Cut {
            return Ok(());
        }
        let far = TcpStream::connect(&self.target)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let ends = [near.try_clone()?, far.try_clone()?];
        let number = {
            let mut state = self.state();
            if state.traffic == Traffic::Cut {
                return Ok(());
            }
            let number = state.next;
            state.next += 1;
            state.connections.push((number, ends));
            number
        };
        let directions = Arc::new(AtomicU8::new(2));
        let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
        self.pass((number, Arc::clone(&directions)), near_too, far_too);
        self.pass((number, directions), far, near);
        Ok(())
    }

    /// Passes one direction of a connection on, in a thread of its own.
    fn pass(
        self: &Arc<Self>,
        (number, directions): (u64, Arc<AtomicU8>),
        mut from: TcpStream,
        mut to: TcpStream,
    ) {
        let shared = Arc::clone(self);
        thread::spawn(move || {
            let mut bytes = vec![0; 64 << 10];
            let is_whole = loop {
                let count = match from.read(&mut bytes) {
                    Ok(0) => break true,
                    Ok(count) => count,
                    Err(_) => break false,
                };
                shared.wait_while_it_stands();
                if to.write_all(&bytes[..count]).is_err() {
                    break false;
                }
            };
            shared.wait_while_it_stands();
            // One direction may end long before the other, unless something is wrong.
            if !(is_whole && to.shutdown(Shutdown::Write).is_ok()) {
                close(&from);
                close(&to);
            }
            if directions.fetch_sub(1, Ordering::SeqCst) == 1 {
                shared.forget(number);
            }
        });
    }

    fn wait_while_it_stands(&self) {
        let stands = |state: &mut State| state.traffic == Traffic::Stands;
        let waited = self.changed.wait_while(self.state(), stands);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn forget(&self, number: u64) {
        let mut state = self.state();
        state.connections.retain(|(known, _)| *known != number);
    }
}

fn close(stream: &TcpStream) {
    // One that has ended cannot be closed again.
    drop(stream.shutdown(Shutdown::Both));
}
