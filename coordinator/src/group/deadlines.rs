//! What takes too long: silent workers, steps and formations that do not end; and the time that the coordinator lost itself.

use std::time::Duration;

use phalanx_proto::{
    fault::{Fault, FaultKind},
    ids::{Rank, Step},
};

use super::{
    actor::{Group, Phase},
    roster::{Load, Member, MemberId},
};

impl Group {
    /// Drops workers that have been silent for too long, and ends epochs whose time is up.
    pub(super) fn check_deadlines(&mut self, now: Duration) {
        self.drop_silent(now);
        let limits = &self.limits;
        match &self.phase {
            Phase::Preparing { since, .. } if now.saturating_sub(*since) > limits.prepare_timeout => {
                for id in self.roster.laggards(|member| member.readiness.rendezvous.is_none()) {
                    self.dismiss(id, "it did not answer in time");
                }
            }
            Phase::Forming { since, .. } if now.saturating_sub(*since) > limits.form_timeout => {
                for id in self.roster.laggards(|member| !member.readiness.formed || member.readiness.plans.is_none()) {
                    self.dismiss(id, "it did not form in time");
                }
            }
            Phase::Running { flight, .. } => {
                if let Some((step, waited, ranks)) = flight.overdue(now) {
                    self.end_overdue(step, waited, &ranks);
                }
            }
            _ => {}
        }
        if self.stalled_since.is_some_and(|since| now.saturating_sub(since) > self.limits.group_stall) {
            let text = format!("the group did not form again: {}", self.last_failure);
            self.fail_live(&Fault::new(FaultKind::WorkerLost, text));
        }
    }

    /// A worker that runs says so every second, whatever it does; one that is silent for longer hangs as a whole.
    fn drop_silent(&mut self, now: Duration) {
        let limits = &self.limits;
        let silent = |member: &Member| {
            let loading = member.rank.is_some() && matches!(member.load, Load::Loading { .. });
            let patience = if loading { limits.load_silence } else { limits.silence };
            now.saturating_sub(member.heard) > patience
        };
        for id in self.roster.find_all(silent) {
            self.dismiss(id, "it gave no sign of life");
        }
    }

    /// Ends an epoch whose step takes too long. In a sum every rank waits for the one that hangs, so a missing answer
    /// alone says little; together with silence on the other stream it does. A rank whose device hangs and whose process
    /// does not is told to abort like the others, and ends itself if it cannot.
    fn end_overdue(&mut self, step: Step, waited: Duration, ranks: &[Rank]) {
        let (now, half) = (self.now(), self.limits.silence / 2);
        let hangs = |member: &Member| {
            member.rank.is_some_and(|rank| ranks.contains(&rank)) && now.saturating_sub(member.heard) > half
        };
        let hung = self.roster.find_all(hangs);
        let ranks: Vec<u32> = ranks.iter().map(|rank| rank.0).collect();
        self.fence(&format!("step {step}: no answer from ranks {ranks:?} after {waited:.1?}"));
        for id in hung {
            self.dismiss(id, "it answered no step and gave no sign of life");
        }
    }

    fn dismiss(&mut self, id: MemberId, reason: &str) {
        let fault = Fault::new(FaultKind::WorkerLost, format!("the coordinator let this worker go: {reason}"));
        self.lose(id, Some(fault), reason);
    }

    /// Gives everybody more time: the coordinator itself was late.
    pub(super) fn forgive(&mut self, lateness: Duration) {
        match &mut self.phase {
            Phase::Preparing { since, .. } | Phase::Forming { since, .. } => *since += lateness,
            Phase::Running { flight, .. } => flight.forgive(lateness),
            Phase::Gathering { .. } | Phase::Failed { .. } => {}
        }
        self.roster.forgive(lateness);
        self.clients.forgive(lateness);
        if let Some(since) = &mut self.stalled_since {
            *since += lateness;
        }
    }
}
