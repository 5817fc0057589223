//! A gRPC client of the coordinator: generates greedily from token ids and prints each token as it arrives.
//!
//! `cargo run --release -p phalanx-proto --example generate -- http://127.0.0.1:7000 3059 304 3061 779 510`

use std::error::Error;

use phalanx_proto::v1::{GenerateRequest, Sampling, generate_event::Event, inference_client::InferenceClient};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let address = args.next().ok_or("usage: generate ADDRESS TOKEN_ID …")?;
    let prompt = args.map(|token| token.parse()).collect::<Result<Vec<u32>, _>>()?;
    let mut client = InferenceClient::connect(address).await?;
    let sampling = Sampling { temperature: Some(0.0), ..Default::default() };
    let request = GenerateRequest { prompt, max_tokens: Some(16), sampling: Some(sampling), ..Default::default() };
    let mut events = client.generate(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Tokens(chunk)) => chunk.tokens.iter().for_each(|token| println!("{}", token.id)),
            Some(Event::Finished(end)) => println!("{:?} after {} tokens", end.reason(), end.completion_tokens),
            Some(Event::Admitted(_)) | None => {}
        }
    }
    Ok(())
}
