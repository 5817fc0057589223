//! A worker without a model: speaks `Cluster` as a real one does, keeps the sequences that plans name, and samples by a
//! hash of all tokens so far. It checks what it is told and stops with a panic when a plan makes no sense.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use phalanx_proto::{
    ids::{SequenceId, TokenId},
    plan::{message_digest, token_digest},
    v1::{self, cluster_client::ClusterClient, step_message, worker_command::Command, worker_event::Event},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};
use xxhash_rust::xxh3::xxh3_64;

/// Sampled tokens lie below this.
const TOY_VOCABULARY: u64 = 200_000;

/// The token that follows `tokens`.
pub(crate) fn next_token(tokens: &[u32]) -> u32 {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    (xxh3_64(&bytes) % TOY_VOCABULARY) as u32
}

/// What a request gets when nothing disturbs it.
pub(crate) fn continuation(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(prompt.len())
}

/// How a worker behaves, changeable while it runs.
#[derive(Debug)]
pub(crate) struct Conduct {
    /// Time that a step takes, in microseconds.
    pub(crate) step_us: AtomicU64,
    /// The step whose token digest it reports wrongly, once. 0: none.
    pub(crate) lie_at: AtomicU64,
    /// Lies in this many epochs, in the step of each that `lies_in` names.
    pub(crate) lies: AtomicU32,
    pub(crate) lies_in: AtomicU64,
    /// Lies in every step that computes a sequence whose prompt begins with this token. 0: in none.
    pub(crate) poison: AtomicU32,
    /// Between two signs of life.
    pub(crate) pulse_interval: Duration,
    /// While true, it answers nothing, neither steps nor commands.
    pub(crate) hangs: watch::Sender<bool>,
    /// Sequences that it holds, after its last step.
    pub(crate) sequences: AtomicU64,
    /// Trace contexts of admitted sequences.
    pub(crate) traceparents: Mutex<Vec<String>>,
    /// The last `Form` that it was given.
    pub(crate) formed: Mutex<Option<v1::Form>>,
    /// Why it was asked to leave.
    pub(crate) left: Mutex<Option<String>>,
}

/// What a worker says of itself.
#[derive(Clone, Debug)]
pub(crate) struct Nature {
    pub(crate) hello: v1::Hello,
    pub(crate) free_bytes: u64,
    /// Said instead of `Loaded`.
    pub(crate) load_fault: Option<v1::WorkerFault>,
}

/// A running worker; aborted when dropped.
pub(crate) struct Worker {
    pub(crate) conduct: Arc<Conduct>,
    pub(crate) task: JoinHandle<Result<(), Status>>,
}

impl Worker {
    pub(crate) fn spawn(address: SocketAddr, nature: Nature) -> Self {
        let conduct = Arc::new(Conduct {
            step_us: AtomicU64::new(0),
            lie_at: AtomicU64::new(0),
            lies: AtomicU32::new(0),
            lies_in: AtomicU64::new(1),
            poison: AtomicU32::new(0),
            pulse_interval: Duration::from_millis(100),
            hangs: watch::Sender::new(false),
            sequences: AtomicU64::new(0),
            traceparents: Mutex::default(),
            formed: Mutex::default(),
            left: Mutex::default(),
        });
        let task = tokio::spawn(live(address, nature, Arc::clone(&conduct)));
        Self { conduct, task }
    }

    pub(crate) fn step_takes(&self, time: Duration) {
        self.conduct.step_us.store(time.as_micros() as u64, Ordering::Relaxed);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits while the worker is to hang.
async fn unless_hanging(conduct: &Conduct) {
    let mut hangs = conduct.hangs.subscribe();
    hangs.wait_for(|hangs| !hangs).await.unwrap();
}

async fn live(address: SocketAddr, nature: Nature, conduct: Arc<Conduct>) -> Result<(), Status> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut client = ClusterClient::new(channel);
    let (events, receiver) = mpsc::channel(32);
    let say = async |event| events.send(v1::WorkerEvent { event: Some(event) }).await.unwrap();
    let incarnation = nature.hello.incarnation;
    say(Event::Hello(nature.hello)).await;
    let mut commands = client.attach(ReceiverStream::new(receiver)).await?.into_inner();
    let _pulse = AbortOnDrop(tokio::spawn(pulse(events.clone(), Arc::clone(&conduct))));
    let (mut highest, mut rank, mut steps) = (0, 0, None);
    while let Some(command) = commands.message().await? {
        unless_hanging(&conduct).await;
        match command.command.unwrap() {
            Command::Assign(assign) => {
                rank = assign.rank;
                if let Some(fault) = &nature.load_fault {
                    say(Event::Fault(fault.clone())).await;
                    continue;
                }
                say(Event::Progress(v1::LoadProgress { loaded_bytes: 500, total_bytes: 1000 })).await;
                say(Event::Loaded(v1::Loaded { weight_bytes: 1000, free_bytes: nature.free_bytes })).await;
            }
            Command::Prepare(prepare) => {
                assert_eq!(prepare.incarnation, incarnation);
                assert!(prepare.epoch > highest, "epochs only grow");
                highest = prepare.epoch;
                let rendezvous = vec![rank as u8, prepare.epoch as u8];
                say(Event::Prepared(v1::Prepared { epoch: prepare.epoch, rendezvous })).await;
            }
            Command::Form(form) => {
                assert_eq!((form.epoch, form.incarnation), (highest, incarnation));
                assert_eq!(form.rendezvous[rank as usize], [rank as u8, form.epoch as u8]);
                *conduct.formed.lock().unwrap() = Some(form.clone());
                let join = v1::StepJoin { epoch: form.epoch, rank, incarnation };
                let stepping = step(client.clone(), join, Arc::clone(&conduct));
                steps = Some(AbortOnDrop(tokio::spawn(stepping)));
                say(Event::Formed(v1::Formed { epoch: form.epoch })).await;
            }
            Command::Fence(fence) => {
                assert!(fence.epoch <= highest);
                steps.take();
                conduct.sequences.store(0, Ordering::Relaxed);
            }
            Command::Leave(leave) => {
                *conduct.left.lock().unwrap() = Some(leave.reason);
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Gives signs of life while the worker does not hang.
async fn pulse(events: mpsc::Sender<v1::WorkerEvent>, conduct: Arc<Conduct>) {
    loop {
        unless_hanging(&conduct).await;
        if events.send(v1::WorkerEvent { event: Some(Event::Pulse(v1::Pulse {})) }).await.is_err() {
            return;
        }
        tokio::time::sleep(conduct.pulse_interval).await;
    }
}

async fn step(mut client: ClusterClient<Channel>, join: v1::StepJoin, conduct: Arc<Conduct>) {
    let (results, receiver) = mpsc::channel(8);
    let message = |message| v1::StepMessage { message: Some(message) };
    results.send(message(step_message::Message::Join(join))).await.unwrap();
    let Ok(response) = client.steps(ReceiverStream::new(receiver)).await else { return };
    let mut plans = response.into_inner();
    let mut sequences = Sequences::default();
    let mut expected = 1;
    while let Ok(Some(plan)) = plans.message().await {
        unless_hanging(&conduct).await;
        assert_eq!((plan.epoch, plan.step), (join.epoch, expected), "steps are executed in order, within their epoch");
        expected += 1;
        conduct.traceparents.lock().unwrap().extend(plan.admit.iter().map(|admit| admit.traceparent.clone()));
        let mut result = sequences.execute(&plan);
        conduct.sequences.store(sequences.tokens.len() as u64, Ordering::Relaxed);
        let lies = |lies: u32| lies.checked_sub(1).filter(|_| plan.step == conduct.lies_in.load(Ordering::Relaxed));
        if sequences.computes(&plan, conduct.poison.load(Ordering::Relaxed))
            || conduct.lie_at.compare_exchange(plan.step, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            || conduct.lies.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lies).is_ok()
        {
            result.token_digest ^= 1;
        }
        if join.rank != 0 {
            result.sampled.clear();
        }
        let time = conduct.step_us.load(Ordering::Relaxed);
        if time > 0 {
            tokio::time::sleep(Duration::from_micros(time)).await;
        }
        if results.send(message(step_message::Message::Result(result))).await.is_err() {
            return;
        }
    }
}

#[derive(Default)]
struct Sequences {
    /// Tokens of each sequence, and how many positions of it were computed.
    tokens: HashMap<u64, (Vec<u32>, usize)>,
}

impl Sequences {
    /// Whether the plan computes a sequence whose prompt begins with `token`.
    fn computes(&self, plan: &v1::Plan, token: u32) -> bool {
        let begins = |slice: &v1::Slice| self.tokens.get(&slice.sequence).is_some_and(|held| held.0[0] == token);
        token != 0 && plan.slices.iter().any(begins)
    }

    fn execute(&mut self, plan: &v1::Plan) -> v1::StepResult {
        for sequence in &plan.retire {
            self.tokens.remove(sequence).expect("only known sequences are retired");
        }
        for admit in &plan.admit {
            let earlier = self.tokens.insert(admit.sequence, (admit.tokens.clone(), 0));
            assert!(earlier.is_none(), "a sequence is admitted once");
        }
        let mut sampled = Vec::new();
        for slice in &plan.slices {
            let (tokens, computed) = self.tokens.get_mut(&slice.sequence).expect("only known sequences are computed");
            // What comes before the first slice is in shared blocks of the prefix cache.
            assert!(*computed == 0 || *computed == slice.first_position as usize, "positions have no gaps");
            *computed = (slice.first_position + slice.num_tokens) as usize;
            assert!(*computed <= tokens.len(), "only tokens that exist are computed");
            if slice.sample {
                let id = next_token(&tokens[..*computed]);
                tokens.push(id);
                let token = Some(v1::Token { id, ..Default::default() });
                sampled.push(v1::SampledToken { sequence: slice.sequence, token });
            }
        }
        let ids = sampled.iter().map(|s| (SequenceId(s.sequence), TokenId(s.token.as_ref().unwrap().id)));
        v1::StepResult {
            epoch: plan.epoch,
            step: plan.step,
            plan_digest: message_digest(plan),
            token_digest: token_digest(ids),
            sampled,
            prompt_logprobs: Vec::new(),
            timing: Some(v1::StepTiming { execute_us: 10, collective_us: 2, sample_us: 1, idle_us: 0 }),
        }
    }
}
