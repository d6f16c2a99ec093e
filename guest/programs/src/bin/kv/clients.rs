//! Connections: a socket for each client that there may be, which listens while it has none.

use core::mem::MaybeUninit;

use limosa_micro_logic::kv::{Output, REPLY_BYTES_MAX, Session, Store};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Duration;

/// Bytes that may lie in a connection in each direction.
const BUFFER_BYTES: usize = 32 << 10;
/// Bytes of buffers that a connection takes.
pub(crate) const SOCKET_BYTES: usize = 2 * BUFFER_BYTES;
/// Most bytes that are answered a client before the next one has its turn.
pub(crate) const ANSWER_BYTES_MAX: usize = 16 << 10;
/// How often a silent client is asked whether it is there, and after which silence it is not. Long: a guest
/// that is moved may be silent itself for a while.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// The same while a connection begins and ends: whoever only begins them shall not have all of them for long.
const PASSING_MAX: Duration = Duration::from_secs(10);

/// A client, or a place for one.
pub(crate) struct Client {
    handle: SocketHandle,
    session: Session,
}

/// All of them.
pub(crate) struct Clients {
    clients: &'static mut [Client],
    port: u16,
    /// Where answers are written before they go into a socket.
    answer: &'static mut [u8],
}

impl Clients {
    /// As many as there are places, with buffers for each behind the one for answers.
    pub(crate) fn new(
        places: &'static mut [MaybeUninit<Client>],
        buffers: &'static mut [u8],
        port: u16,
        sockets: &mut SocketSet<'static>,
    ) -> Self {
        let (answer, buffers) = buffers.split_at_mut(ANSWER_BYTES_MAX);
        let mut buffers = buffers.chunks_exact_mut(BUFFER_BYTES);
        let mut buffer = || SocketBuffer::new(buffers.next().expect("two for each place"));
        let clients = super::fill(places, |_| {
            let mut socket = Socket::new(buffer(), buffer());
            socket.set_nagle_enabled(false);
            socket.set_keep_alive(Some(KEEP_ALIVE));
            Client {
                handle: sockets.add(socket),
                session: Session::new(),
            }
        });
        Self {
            clients,
            port,
            answer,
        }
    }

    /// Reads what clients have sent and answers it; how many requests were carried out.
    pub(crate) fn serve(&mut self, sockets: &mut SocketSet<'_>, store: &mut Store<'_>) -> u64 {
        let mut requests = 0;
        for client in self.clients.iter_mut() {
            let socket = sockets.get_mut::<Socket<'_>>(client.handle);
            if !socket.is_open() {
                client.session.reset(store);
                socket.set_timeout(Some(PASSING_MAX));
                socket
                    .listen(self.port)
                    .expect("a socket that is not open can listen");
            } else if !socket.is_listening() {
                client.talk(socket, store, self.answer);
                requests += client.session.take_requests();
            }
        }
        requests
    }
}

impl Client {
    fn talk(&mut self, socket: &mut Socket<'_>, store: &mut Store<'_>, answer: &mut [u8]) {
        let lasts = matches!(socket.state(), State::Established | State::CloseWait);
        socket.set_timeout(Some(if lasts { SILENCE_MAX } else { PASSING_MAX }));
        let mut left = answer.len();
        while left >= REPLY_BYTES_MAX && (socket.can_recv() || !self.session.is_idle()) {
            let (read, answered) = self.exchange(socket, store, &mut answer[..left]);
            if read == 0 && answered == 0 {
                break;
            }
            left -= answered;
        }
        let has_gone = socket.state() == State::CloseWait && socket.recv_queue() == 0;
        if self.session.is_over() || has_gone && self.session.is_idle() {
            // What is answered goes out before.
            socket.close();
        }
    }

    /// Takes a piece of what has come and answers it; how many bytes it has read, and answered.
    fn exchange(
        &mut self,
        socket: &mut Socket<'_>,
        store: &mut Store<'_>,
        answer: &mut [u8],
    ) -> (usize, usize) {
        let room = socket.send_capacity() - socket.send_queue();
        let room = room.min(answer.len());
        let mut output = Output::new(&mut answer[..room]);
        let session = &mut self.session;
        let read = if socket.can_recv() && socket.may_send() {
            socket.recv(|bytes| {
                let read = session.serve(store, bytes, &mut output);
                (read, read)
            })
        } else if socket.can_recv() {
            // Nobody will be answered.
            socket.recv(|bytes| (bytes.len(), bytes.len()))
        } else {
            Ok(session.serve(store, &[], &mut output))
        };
        let answered = output.bytes_so_far();
        let sent = socket.send_slice(answered);
        (read.unwrap_or(0), sent.unwrap_or(0))
    }
}
