//! A TCP proxy that misbehaves on demand: late, lossy, silent, half-open or one byte a second, changed while it runs.
//!
//! Threads and blocking sockets only, so that a test's own runtime cannot be held up by it.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

/// What a lost segment costs: the sender's first retransmission timeout on a fast network.
const RETRANSMISSION: Duration = Duration::from_millis(200);
/// Pause between two bytes of a trickle.
const TRICKLE: Duration = Duration::from_secs(1);
/// Pieces that wait for their time, a direction; more wait in the sender's own buffers.
const IN_FLIGHT: usize = 1024;
/// Longest piece.
const PIECE_BYTES: usize = 16 << 10;

/// How the proxy treats what passes through it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weather {
    /// Everything passes at once.
    Clear,
    /// Everything passes later.
    Slow {
        /// Each way.
        delay: Duration,
        /// Up to this much more, differently for every piece.
        jitter: Duration,
        /// Share of pieces, from 0 to 1, that arrive only when they are sent again, with those behind them.
        loss: f64,
    },
    /// Nothing passes and nothing is closed; connections made meanwhile begin when it is over.
    BlackHole,
    /// Connections made meanwhile are accepted and never answered, not even later. Others pass.
    HalfOpen,
    /// One byte a second, each way.
    Trickle,
}

/// A running proxy; it and its connections end when it is dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    weather: Weather,
    ended: bool,
    /// Both ends of every connection.
    streams: Vec<TcpStream>,
    accepted: usize,
    passed: u64,
}

impl Proxy {
    /// Listens on a free port of loopback and passes connections on to `target`.
    ///
    /// # Panics
    /// When there is no free port.
    pub fn to(target: SocketAddr) -> Self {
        let listener =
            TcpListener::bind("127.0.0.1:0").unwrap_or_else(|error| panic!("a proxy cannot listen: {error}"));
        let address = listener.local_addr().unwrap_or_else(|error| panic!("a proxy has no address: {error}"));
        let state = State { weather: Weather::Clear, ended: false, streams: Vec::new(), accepted: 0, passed: 0 };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let own = Arc::clone(&shared);
        std::thread::spawn(move || accept(&listener, target, &own));
        Self { address, shared }
    }

    /// Changes the weather from now on, for old connections too.
    pub fn set(&self, weather: Weather) {
        self.shared.lock().weather = weather;
        self.shared.changed.notify_all();
    }

    /// Closes every connection; new ones are accepted.
    pub fn cut(&self) {
        for stream in self.shared.lock().streams.drain(..) {
            // It fails for one that is closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.shared.lock().accepted
    }

    /// Bytes passed on so far, both ways.
    pub fn passed(&self) -> u64 {
        self.shared.lock().passed
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        self.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the weather changes, `time` at most.
    fn wait(&self, time: Duration) {
        let state = self.lock();
        let before = state.weather;
        let unchanged = |state: &mut State| state.weather == before && !state.ended;
        drop(self.changed.wait_timeout_while(state, time, unchanged));
    }

    /// The weather; nothing when the proxy has ended.
    fn weather(&self) -> Option<Weather> {
        let state = self.lock();
        (!state.ended).then_some(state.weather)
    }
}

fn accept(listener: &TcpListener, target: SocketAddr, shared: &Arc<Shared>) {
    while let Ok((client, _)) = listener.accept() {
        let Some(weather) = shared.weather() else { return };
        shared.lock().accepted += 1;
        let Ok(kept) = client.try_clone() else { continue };
        shared.lock().streams.push(kept);
        if weather != Weather::HalfOpen {
            let own = Arc::clone(shared);
            std::thread::spawn(move || connect(client, target, &own));
        }
    }
}

fn connect(client: TcpStream, target: SocketAddr, shared: &Arc<Shared>) {
    while shared.weather() == Some(Weather::BlackHole) {
        shared.wait(Duration::from_secs(1));
    }
    let Ok(server) = TcpStream::connect(target) else {
        let _ = client.shutdown(Shutdown::Both);
        return;
    };
    let clones = (client.try_clone(), server.try_clone(), server.try_clone());
    let (Ok(client_out), Ok(server_out), Ok(kept)) = clones else { return };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    shared.lock().streams.push(kept);
    pump(client, server_out, shared);
    pump(server, client_out, shared);
}

/// Passes one direction on.
fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Arc<Shared>) {
    let (pieces, arriving) = mpsc::sync_channel::<(Instant, Vec<u8>)>(IN_FLIGHT);
    let reading = Arc::clone(shared);
    std::thread::spawn(move || {
        let (mut due, mut dice) = (Instant::now(), Dice(0x9e37_79b9_7f4a_7c15));
        let mut piece = vec![0; PIECE_BYTES];
        while let (Ok(count @ 1..), Some(weather)) = (from.read(&mut piece), reading.weather()) {
            // Never before the piece ahead of it.
            due = due.max(Instant::now() + lateness(weather, &mut dice));
            if pieces.send((due, piece[..count].to_vec())).is_err() {
                return;
            }
        }
    });
    let writing = Arc::clone(shared);
    std::thread::spawn(move || {
        for (due, piece) in arriving {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if write(&mut to, &piece, &writing).is_err() {
                break;
            }
        }
        // A close is as silent as everything else.
        while writing.weather() == Some(Weather::BlackHole) {
            writing.wait(Duration::from_secs(1));
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

fn write(to: &mut TcpStream, piece: &[u8], shared: &Shared) -> std::io::Result<()> {
    let mut rest = piece;
    while !rest.is_empty() {
        let (now, later) = match shared.weather() {
            None => return Ok(()),
            Some(Weather::BlackHole) => {
                shared.wait(Duration::from_secs(1));
                continue;
            }
            Some(Weather::Trickle) => rest.split_at(1),
            Some(Weather::Clear | Weather::Slow { .. } | Weather::HalfOpen) => (rest, &[][..]),
        };
        to.write_all(now)?;
        shared.lock().passed += now.len() as u64;
        if shared.weather() == Some(Weather::Trickle) {
            shared.wait(TRICKLE);
        }
        rest = later;
    }
    Ok(())
}

fn lateness(weather: Weather, dice: &mut Dice) -> Duration {
    match weather {
        Weather::Slow { delay, jitter, loss } => {
            let lost = if dice.roll() < loss { RETRANSMISSION } else { Duration::ZERO };
            delay + jitter.mul_f64(dice.roll()) + lost
        }
        _ => Duration::ZERO,
    }
}

/// The same numbers in every run.
struct Dice(u64);

impl Dice {
    /// At least 0 and less than 1.
    fn roll(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers every byte with the same byte.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
            }
        });
        address
    }

    /// Sends `bytes` and reads as many back; how long that took, or nothing if they are not there in time.
    fn round_trip(stream: &mut TcpStream, bytes: &[u8], patience: Duration) -> Option<Duration> {
        let (start, mut back) = (Instant::now(), vec![0; bytes.len()]);
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.write_all(bytes).unwrap();
        stream.read_exact(&mut back).ok()?;
        assert_eq!(back, bytes);
        Some(start.elapsed())
    }

    #[test]
    fn it_delays_holds_back_trickles_and_heals() {
        let proxy = Proxy::to(echo());
        let mut stream = TcpStream::connect(proxy.address).unwrap();
        assert!(round_trip(&mut stream, b"clear", Duration::from_secs(5)).is_some());
        proxy.set(Weather::Slow { delay: Duration::from_millis(100), jitter: Duration::ZERO, loss: 0.0 });
        let slow = round_trip(&mut stream, b"slow", Duration::from_secs(5)).unwrap();
        assert!((Duration::from_millis(200)..Duration::from_secs(2)).contains(&slow), "{slow:?}");
        proxy.set(Weather::BlackHole);
        assert_eq!(round_trip(&mut stream, b"held", Duration::from_millis(300)), None);
        proxy.set(Weather::Clear);
        let mut held = [0; 4];
        stream.read_exact(&mut held).unwrap();
        assert_eq!(&held, b"held", "what was held back arrives when it is over");
        proxy.set(Weather::Trickle);
        let trickled = round_trip(&mut stream, b"ab", Duration::from_secs(10)).unwrap();
        assert!(trickled >= Duration::from_millis(900), "{trickled:?}");
        assert_eq!((proxy.accepted(), proxy.passed()), (1, 2 * (5 + 4 + 4 + 2)));
    }

    #[test]
    fn a_half_open_connection_is_never_answered_and_a_cut_one_ends() {
        let proxy = Proxy::to(echo());
        proxy.set(Weather::HalfOpen);
        let mut stream = TcpStream::connect(proxy.address).unwrap();
        assert_eq!(round_trip(&mut stream, b"hello", Duration::from_millis(200)), None);
        proxy.set(Weather::Clear);
        assert_eq!(round_trip(&mut stream, b"hello", Duration::from_millis(200)), None);
        proxy.cut();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_)));
        let mut next = TcpStream::connect(proxy.address).unwrap();
        assert!(round_trip(&mut next, b"again", Duration::from_secs(5)).is_some());
    }
}
