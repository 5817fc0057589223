//! A gateway before a scripted coordinator.

use std::{path::PathBuf, sync::Arc, time::Duration};

use phalanx_gateway::{Config, config::CurrentDate, run};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    client::Client,
    coordinator::Coordinator,
    golden::{Line, root},
};

/// Longest time that a test waits for something to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Gateway {
    pub(crate) client: Client,
    pub(crate) coordinator: Arc<Coordinator>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) ended: JoinHandle<anyhow::Result<()>>,
}

pub(crate) fn nano() -> PathBuf {
    root().join("deploy/models/nano")
}

/// A gateway that tells the model no date, as most golden lines have it.
pub(crate) async fn start() -> Gateway {
    start_with(|_| {}).await
}

pub(crate) async fn start_with(configure: impl FnOnce(&mut Config)) -> Gateway {
    start_for_key("", configure).await
}

/// A gateway that is ready for the owner of a key.
pub(crate) async fn start_for_key(key: &str, configure: impl FnOnce(&mut Config)) -> Gateway {
    let gateway = start_unready(configure).await;
    timeout(PATIENCE, async {
        while gateway.client.get_as(key, "/readyz").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the gateway becomes ready");
    gateway
}

pub(crate) async fn start_unready(configure: impl FnOnce(&mut Config)) -> Gateway {
    let (coordinator, address) = Coordinator::start().await;
    let mut config = Config::new(format!("http://{address}"), nano());
    config.current_date = CurrentDate::None;
    configure(&mut config);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client(listener.local_addr().unwrap());
    let shutdown = CancellationToken::new();
    let ended = tokio::spawn(run(config, listener, shutdown.clone()));
    Gateway { client, coordinator, shutdown, ended }
}

/// A gateway that tells the model the date of a golden line.
pub(crate) async fn start_for(line: &Line) -> Gateway {
    let date = line.current_date.clone().map_or(CurrentDate::None, CurrentDate::Fixed);
    start_with(|config| config.current_date = date).await
}
