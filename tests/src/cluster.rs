//! A cluster started as a user starts it, and ended when the test ends.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

/// Longest time a cluster may take to its ready line.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time it may take to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// The binary under test, built beside the tests.
///
/// # Panics
/// When it has not been built.
pub fn binary() -> PathBuf {
    let tests = std::env::current_exe().unwrap_or_default();
    let directory = tests.parent().and_then(std::path::Path::parent).map(PathBuf::from).unwrap_or_default();
    let binary = directory.join("phalanx");
    assert!(binary.exists(), "{} is missing: build it with `cargo build --release`", binary.display());
    binary
}

/// A running `phalanx serve`.
pub struct Cluster {
    process: Child,
    /// Base address, such as `http://127.0.0.1:40123`.
    pub url: String,
    /// Everything it printed up to and including the curl to try.
    pub banner: String,
}

impl Cluster {
    /// Starts `phalanx serve` with a free port and `args`, and waits for its ready line.
    ///
    /// # Panics
    /// When it ends or says nothing within a minute.
    pub fn start(args: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.arg("serve").args(args).args(["--port", "0"]);
        Self::launch(command, START_TIMEOUT)
    }

    /// Starts a prepared `phalanx serve` command and waits for its ready line.
    ///
    /// # Panics
    /// When it ends or says nothing in time.
    pub fn launch(mut command: Command, timeout: Duration) -> Self {
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap_or_else(|error| {
            panic!("{command:?} cannot be started: {error}");
        });
        let stdout = process.stdout.take().unwrap_or_else(|| panic!("standard output is piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { break };
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut banner = String::new();
        let deadline = Instant::now() + timeout;
        while !banner.contains("\ntry: ") {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => banner.push_str(&(line + "\n")),
                Err(_) => {
                    let _ = process.kill();
                    panic!("{command:?} printed no ready line, only: {banner:?}");
                }
            }
        }
        let url = banner.split("at http://").nth(1).and_then(|rest| rest.split_whitespace().next());
        let url = format!("http://{}", url.unwrap_or_else(|| panic!("no address in {banner:?}")));
        Self { process, url, banner }
    }

    /// Process id of the supervisor.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Process ids of the children whose command line contains `role`.
    pub fn children(&self, role: &str) -> Vec<u32> {
        let me = self.pid().to_string();
        let list = Command::new("ps").args(["--ppid", &me, "-o", "pid=,args="]).output();
        let text = list.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        let matching = text.lines().filter(|line| line.contains(role));
        matching.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
    }

    /// Sends SIGTERM and waits for the end; answers with the exit code.
    ///
    /// # Panics
    /// When the process does not end in time.
    pub fn stop(&mut self) -> Option<i32> {
        let _ = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            if let Ok(Some(status)) = self.process.try_wait() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "phalanx serve is still running {STOP_TIMEOUT:?} after SIGTERM");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Ok(None) = self.process.try_wait() {
            let _ = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
            let deadline = Instant::now() + STOP_TIMEOUT;
            while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// Runs a command to its end and answers with exit code, standard output and standard error.
///
/// # Panics
/// When it cannot be started.
pub fn output_of(command: &mut Command) -> (Option<i32>, String, String) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap_or_else(|error| {
        panic!("{command:?} cannot be started: {error}");
    });
    let stderr = child.stderr.take();
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    });
    let mut text = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        let _ = stdout.read_to_string(&mut text);
    }
    let code = child.wait().ok().and_then(|status| status.code());
    (code, text, errors.join().unwrap_or_default())
}
