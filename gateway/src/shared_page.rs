//! A page that clients who leave it unread share.

use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use axum::body::Bytes;

/// Age up to which a page may be sent once more.
const FRESH: Duration = Duration::from_secs(1);

/// The last page, for as long as somebody has not taken it yet. Whoever asks when nobody holds one gets a new one, so
/// that a page is old only while clients leave theirs unread: ten thousand of them then cost some pages and not as many.
#[derive(Default)]
pub(crate) struct SharedPage(Mutex<Option<(Instant, Weak<[u8]>)>>);

impl SharedPage {
    /// The page that others hold, if it is fresh, or the one that `render` makes.
    pub(crate) fn get<E>(&self, render: impl FnOnce() -> Result<String, E>) -> Result<Bytes, E> {
        // A panic while it was held can only have been in `render`: the page before is still whole.
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, page)) = &*last
            && at.elapsed() < FRESH
            && let Some(page) = page.upgrade()
        {
            return Ok(Bytes::from_owner(page));
        }
        let page: Arc<[u8]> = render()?.into_bytes().into();
        *last = Some((Instant::now(), Arc::downgrade(&page)));
        Ok(Bytes::from_owner(page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_shared_while_somebody_holds_it_and_made_anew_otherwise() {
        let (page, made) = (SharedPage::default(), std::cell::Cell::new(0));
        let get = || {
            page.get(|| {
                made.set(made.get() + 1);
                Ok::<_, ()>(made.get().to_string())
            })
        };
        let held = get().unwrap();
        assert_eq!((&*held, &*get().unwrap()), (&b"1"[..], &b"1"[..]));
        drop(held);
        assert_eq!(&*get().unwrap(), b"2");
        assert_eq!(page.get(|| Err("no page")), Err("no page"));
        assert_eq!(&*get().unwrap(), b"3");
    }
}
