//! All kinds of faults, and what has to come of each.
//!
//! A retry is a pause of the policy and everything after it; requests that follow at once, such as those for a new
//! signed address, are none. `fails` rows go on to say that the same read works as soon as the fault is gone.

use std::time::Duration;

use crate::row::{Event, Form, Outcome, Row};
use crate::support::registry::{Door, Fault};

/// Shorter than the first pause of the policy.
const OUTAGE: Duration = Duration::from_millis(40);

const FOREVER: Duration = Duration::MAX;

/// A little shorter than the patience with a silent server.
const SILENCE: Duration = Duration::from_millis(9_990);

/// What passes by itself: the next attempt is right.
pub(crate) fn passing() -> Vec<Row> {
    let status = |name, status| Row::once(name, Fault::Status(status));
    vec![
        Row::once("connection refused", Fault::Refuse(OUTAGE)),
        Row::once("no connection in time", Fault::Deaf(SILENCE)).takes(10),
        Row::after("nobody knows its name", Event::Forget(40)).form(Form::Named, Door::Registry).asks(1..=1, 1..=1),
        Row::once("closed without an answer", Fault::HangUp),
        Row::once("reset without an answer", Fault::ResetHead),
        Row::once("reset behind the head", Fault::Reset { after: 0 }),
        Row::once("reset after 1 KiB", Fault::Reset { after: 1024 }).wasteful(),
        Row::once("reset after 7 KiB", Fault::Reset { after: 7 << 10 }).wasteful(),
        Row::once("short: no body", Fault::Cut { after: 0 }),
        Row::once("short: half a body", Fault::Cut { after: 6000 }).wasteful(),
        Row::once("short: properly ended one byte early", Fault::Missing(1)).wasteful(),
        status("408", 408),
        status("425", 425),
        status("429", 429),
        status("500", 500),
        status("502", 502),
        status("503", 503),
        status("504", 504),
        Row::once("429 with Retry-After", Fault::RetryAfter(429, 7)).takes(7),
        Row::once("503 with Retry-After", Fault::RetryAfter(503, 20)).takes(20),
        Row::once("503 with a date to come back", Fault::RetryAfterDate(503, 9)).takes(8),
        Row::once("silent before the head", Fault::StallHead).takes(10),
        Row::once("silent behind the head", Fault::Stall { after: 0 }).takes(10),
        Row::once("silent in the body", Fault::Stall { after: 5000 }).takes(10).wasteful(),
        Row::once("late", Fault::Late(Duration::from_secs(5))).asks(1..=1, 0..=0).takes(5),
        Row::once("twice 503", Fault::Status(503)).times(2).asks(3..=3, 2..=2),
        Row::once("two resets", Fault::Reset { after: 2048 }).times(2).asks(3..=3, 2..=2).wasteful(),
        // Nobody but the cache can see these.
        Row::once("one wrong bit", Fault::Flip).asks(2..=2, 0..=0).wasteful(),
        Row::once("zeros", Fault::Zeros).asks(2..=2, 0..=0).wasteful(),
        Row::once("bytes of another blob", Fault::OtherBlob).asks(2..=2, 0..=0).wasteful(),
    ]
}

/// What is taken for an answer, or leads nowhere: the reader hears of it at once.
pub(crate) fn lasting() -> Vec<Row> {
    use Outcome::{Corrupt, Deadline, NoRanges, NotFound, Refused, Unavailable, Untrusted};
    let at_once = |name, fault, outcome| Row::once(name, fault).at_once(outcome);
    let improper = |name, fault| at_once(name, fault, NoRanges);
    let always = |name, fault| Row::always(name, fault).fails(Unavailable).asks(6..=6, 5..=5);
    vec![
        at_once("401 without a challenge", Fault::NoChallenge, Refused),
        at_once("401 with a strange challenge", Fault::StrangeChallenge, Refused),
        at_once("403", Fault::Status(403), Refused),
        at_once("404", Fault::Status(404), NotFound),
        at_once("410", Fault::Status(410), NotFound),
        improper("416 for a range that is there", Fault::Status(416)),
        improper("204", Fault::Status(204)),
        improper("304", Fault::Status(304)),
        improper("200 for 206", Fault::WholeFor206).wasteful(),
        improper("another range", Fault::OtherRange).wasteful(),
        improper("wrong Content-Range", Fault::WrongContentRange).wasteful(),
        improper("wrong length of the blob", Fault::WrongTotal).wasteful(),
        improper("no Content-Range", Fault::NoContentRange).wasteful(),
        improper("multipart/byteranges", Fault::Multipart).wasteful(),
        improper("a shorter range", Fault::ShorterRange).wasteful(),
        improper("gzip by a middlebox", Fault::Gzip).wasteful(),
        improper("one byte too many", Fault::Surplus(1)).wasteful(),
        improper("a flood", Fault::Surplus(1 << 20)).wasteful(),
        at_once("a page of a captive portal", Fault::Page, NoRanges).wasteful(),
        Row::once("one byte per second", Fault::Trickle).at_once(Deadline).patience(12).takes(12).wasteful(),
        always("503 for good", Fault::Status(503)),
        always("resets for good", Fault::Reset { after: 1024 }).wasteful(),
        always("nobody listens", Fault::Refuse(FOREVER)).asks(1..=1, 5..=5),
        Row::after("nobody ever knows its name", Event::Forget(u64::MAX))
            .form(Form::Named, Door::Registry)
            .fails(Unavailable)
            .asks(0..=0, 5..=5),
        Row::always("nobody answers", Fault::StallHead).fails(Deadline).asks(6..=6, 5..=5).takes(60),
        Row::always("nobody accepts", Fault::Deaf(FOREVER)).fails(Deadline).asks(1..=1, 5..=5).takes(60),
        Row::always("stay away for an hour", Fault::RetryAfter(503, 3600)).at_once(Unavailable),
        Row::always("wrong bytes for good", Fault::Zeros).fails(Corrupt).asks(2..=2, 0..=0).wasteful(),
    ]
    .into_iter()
    .chain(misleading().into_iter().map(|row| row.fails(Untrusted)))
    .collect()
}

/// Redirects that nobody should follow.
fn misleading() -> Vec<Row> {
    let to = |name, location: &str| Row::once(name, Fault::RedirectTo(location.into())).asks(1..=1, 0..=0);
    vec![
        Row::always("redirect loop", Fault::RedirectLoop).asks(6..=6, 0..=0),
        Row::always("six hops", Fault::RedirectChain(6)).asks(6..=6, 0..=0),
        Row::once("redirect to loopback", Fault::RedirectToLoopback).asks(1..=1, 0..=0),
        to("redirect to loopback of IPv6", "http://[::1]:80/x"),
        to("redirect to a mapped loopback", "http://[::ffff:127.0.0.1]/x"),
        to("redirect to localhost", "http://localhost/x"),
        to("redirect to a number", "http://2130706433/x"),
        to("redirect to the metadata service", "http://169.254.169.254/latest/meta-data/"),
        to("redirect to a private network", "http://10.1.2.3/x"),
        to("redirect to a shared network", "http://100.64.1.1/x"),
        to("redirect to a local network of IPv6", "http://[fd00::1]/x"),
        to("redirect to a link", "http://[fe80::1]/x"),
        Row::once("redirect to a name of loopback", Fault::RedirectToName("rebound.test")).asks(1..=1, 0..=0),
        to("redirect to a name of a private network", "http://private.test/x"),
        to("redirect to a name of the metadata service", "http://metadata.test/x"),
        to("redirect to a file", "file:///etc/passwd"),
        Row::once("redirect to nowhere", Fault::RedirectNowhere).asks(1..=1, 0..=0),
        Row::once("redirect from TLS to plain HTTP", Fault::RedirectToPlain)
            .asks(1..=1, 0..=0)
            .form(Form::Secure, Door::Registry),
    ]
}

/// Redirects as they should be, and signed addresses that end.
pub(crate) fn redirected() -> Vec<Row> {
    let stored = |row: Row| row.form(Form::Stored, Door::Storage);
    let signed = |row: Row| row.form(Form::Stored, Door::Registry);
    vec![
        Row::once("redirect across hosts", Fault::RedirectElsewhere).asks(1..=1, 0..=0),
        Row::once("five hops", Fault::RedirectChain(5)).times(6).asks(6..=6, 0..=0),
        stored(Row::after("a remembered redirect that ends", Event::Pass(1000))),
        stored(Row::after("a signature that is good no more", Event::RevokeSignatures)),
        stored(Row::after("a clock a day ahead", Event::SkewWall(86_400))),
        stored(Row::after("a clock a day behind", Event::SkewWall(-86_400))),
        signed(Row::once("an address that has ended already", Fault::ExpiredSignature))
            .then(Event::RevokeSignatures)
            .asks(2..=2, 0..=0),
        signed(Row::always("addresses that always have ended", Fault::ExpiredSignature))
            .then(Event::RevokeSignatures)
            .asks(2..=3, 0..=0)
            .fails(Outcome::Refused),
        stored(Row::once("403 of the storage", Fault::Status(403))).asks(2..=2, 0..=0),
        stored(Row::always("403 of the storage for good", Fault::Status(403)))
            .asks(2..=3, 0..=0)
            .fails(Outcome::Refused),
        stored(Row::once("404 of the storage", Fault::Status(404))).asks(2..=2, 0..=0),
        stored(Row::once("503 of the storage", Fault::Status(503))),
        stored(Row::once("429 of the storage", Fault::RetryAfter(429, 3))).takes(3),
        // A remembered address that fails is asked for anew at once, one that is new is left for a pause.
        stored(Row::once("the storage hangs up", Fault::HangUp)).asks(2..=2, 0..=1),
        stored(Row::once("the storage is silent", Fault::StallHead)).asks(2..=2, 0..=1).takes(10),
        stored(Row::once("the storage refuses", Fault::Refuse(OUTAGE))),
        stored(Row::once("the storage breaks off", Fault::Reset { after: 1024 })).wasteful(),
        stored(Row::once("200 for 206 of the storage", Fault::WholeFor206)).at_once(Outcome::NoRanges).wasteful(),
        stored(Row::once("gzip of the storage", Fault::Gzip)).at_once(Outcome::NoRanges).wasteful(),
        stored(Row::once("wrong bytes of the storage", Fault::Flip)).asks(2..=2, 0..=0).wasteful(),
        stored(Row::always("the storage redirects to loopback", Fault::RedirectToLoopback))
            .asks(1..=2, 0..=0)
            .fails(Outcome::Untrusted),
        stored(Row::once("the storage redirects on", Fault::RedirectElsewhere)).asks(1..=2, 0..=0),
    ]
}

/// A mirror in front, whatever it does, costs no reader an error.
pub(crate) fn mirrored() -> Vec<Row> {
    let passes = |name, fault| Row::once(name, fault).form(Form::Mirrored, Door::Registry).asks(1..=1, 0..=0);
    vec![
        passes("mirror: refuses", Fault::Refuse(FOREVER)),
        passes("mirror: hangs up", Fault::HangUp),
        passes("mirror: breaks off", Fault::Reset { after: 1024 }).wasteful(),
        passes("mirror: is short", Fault::Cut { after: 4096 }).wasteful(),
        passes("mirror: is long", Fault::Surplus(1)).wasteful(),
        passes("mirror: is silent", Fault::StallHead).takes(3).patience(8),
        passes("mirror: is silent in the body", Fault::Stall { after: 5000 }).takes(3).patience(8).wasteful(),
        passes("mirror: one byte per second", Fault::Trickle).takes(3).patience(8).wasteful(),
        passes("mirror: one byte per second for good", Fault::Trickle).times(u64::MAX).takes(3).patience(8).wasteful(),
        passes("mirror: 401", Fault::NoChallenge),
        passes("mirror: 403", Fault::Status(403)),
        passes("mirror: 404", Fault::Status(404)),
        passes("mirror: 416", Fault::Status(416)),
        passes("mirror: 429", Fault::RetryAfter(429, 100)),
        passes("mirror: 500", Fault::Status(500)),
        passes("mirror: 503", Fault::Status(503)),
        passes("mirror: 200 for 206", Fault::WholeFor206).wasteful(),
        passes("mirror: wrong range", Fault::OtherRange).wasteful(),
        passes("mirror: gzip", Fault::Gzip).wasteful(),
        passes("mirror: a page", Fault::Page).wasteful(),
        passes("mirror: wrong bytes", Fault::Flip).wasteful(),
        passes("mirror: redirect to loopback", Fault::RedirectToLoopback),
        passes("mirror: redirect loop", Fault::RedirectLoop).times(6).asks(6..=6, 0..=0),
        passes("mirror: 503 for good", Fault::Status(503)).times(u64::MAX),
        passes("mirror: wrong bytes for good", Fault::Zeros).times(u64::MAX).wasteful(),
    ]
}

/// Through a forward proxy.
pub(crate) fn proxied() -> Vec<Row> {
    let only = |row: Row| row.form(Form::Proxied, Door::Proxy);
    let first = |row: Row| row.form(Form::ProxyFirst, Door::Proxy).asks(1..=1, 0..=0);
    vec![
        only(Row::once("proxy: 502", Fault::Status(502))),
        only(Row::once("proxy: refuses", Fault::Refuse(OUTAGE))),
        only(Row::always("proxy: dead, and no other way", Fault::Refuse(FOREVER)))
            .asks(1..=1, 5..=5)
            .fails(Outcome::Unavailable),
        first(Row::once("proxy: 502, and another way", Fault::Status(502))),
        first(Row::always("proxy: dead, and another way", Fault::Refuse(FOREVER))),
        first(Row::once("proxy: silent, and another way", Fault::StallHead)).takes(3),
    ]
}

/// Logins and tokens. A token is renewed by the read that suffers, unless the row says otherwise.
pub(crate) fn guarded() -> Vec<Row> {
    let token = |row: Row| row.form(Form::Token, Door::Tokens).then(Event::RevokeTokens);
    let passes = |name, fault| token(Row::once(name, fault));
    let works = |name, fault| token(Row::once(name, fault)).asks(1..=1, 0..=0);
    let event = |name, form, event| Row::after(name, event).form(form, Door::Tokens);
    let realm = |name, base: &str| {
        Row::once(name, Fault::Realm(base.into())).form(Form::SecureToken, Door::Registry).at_once(Outcome::Untrusted)
    };
    vec![
        event("a token that is good no more", Form::Token, Event::RevokeTokens),
        event("a token that ends in the middle of a blob", Form::Token, Event::Pass(300)),
        event("a token by TLS", Form::SecureToken, Event::RevokeTokens),
        event("a token for a refresh token", Form::Refresh, Event::RevokeTokens),
        event("a token for everybody", Form::Public, Event::RevokeTokens),
        event("a password each time", Form::Basic, Event::None).asks(0..=0, 0..=0),
        event("token: a clock a day ahead", Form::Token, Event::SkewWall(86_400)).asks(0..=1, 0..=0),
        event("token: a clock a day behind", Form::Token, Event::SkewWall(-86_400)).asks(0..=1, 0..=0),
        works("token: issued tomorrow", Fault::SkewedToken(86_400)),
        works("token: issued yesterday", Fault::SkewedToken(-86_400)),
        works("token: no word about its end", Fault::EndlessToken),
        works("token: a short one", Fault::ShortToken(2)),
        works("token: late", Fault::Late(Duration::from_secs(4))).takes(4),
        passes("token server: refuses", Fault::Refuse(OUTAGE)),
        passes("token server: hangs up", Fault::HangUp),
        passes("token server: 500", Fault::Status(500)),
        passes("token server: 503", Fault::Status(503)),
        passes("token server: 429", Fault::RetryAfter(429, 5)).takes(5),
        passes("token server: silent", Fault::StallHead).takes(10),
        passes("token server: no token", Fault::NoToken),
        token(Row::always("token server: down", Fault::Refuse(FOREVER))).asks(1..=1, 5..=5).fails(Outcome::Unavailable),
        token(Row::once("token server: 401", Fault::Status(401))).at_once(Outcome::Unauthorized),
        token(Row::once("token server: 403", Fault::Status(403))).at_once(Outcome::Unauthorized),
        event("no login is good any more", Form::Token, Event::LockOut).fails(Outcome::Unauthorized),
        event("no password is good any more", Form::Basic, Event::LockOut).asks(0..=0, 0..=0).fails(Outcome::Refused),
        Row::once("a token is refused", Fault::TokenRefused).form(Form::Token, Door::Registry).asks(2..=2, 0..=0),
        Row::always("all tokens are refused", Fault::TokenRefused)
            .form(Form::Token, Door::Registry)
            .asks(2..=2, 0..=0)
            .fails(Outcome::Refused),
        Row::once("a token server without TLS", Fault::ForeignRealm)
            .form(Form::SecureToken, Door::Registry)
            .at_once(Outcome::Untrusted),
        realm("a token server on loopback", "https://127.0.0.1"),
        realm("a token server in a private network", "https://10.0.0.1"),
        realm("a token server that is the metadata service", "http://169.254.169.254"),
        event("token and storage: a signature ends", Form::Guarded, Event::RevokeSignatures).asks(0..=1, 0..=0),
        event("token and storage: a token ends", Form::Guarded, Event::RevokeTokens).asks(0..=1, 0..=0),
        event("token and storage: both end", Form::Guarded, Event::Pass(1200)).asks(1..=1, 0..=0),
        Row::once("token and storage: redirected on", Fault::RedirectElsewhere)
            .form(Form::Guarded, Door::Storage)
            .asks(1..=2, 0..=0),
        Row::once("token: redirected across hosts", Fault::RedirectElsewhere)
            .form(Form::Token, Door::Registry)
            .asks(1..=1, 0..=0),
        Row::once("password: redirected across hosts", Fault::RedirectElsewhere)
            .form(Form::Basic, Door::Registry)
            .asks(1..=1, 0..=0),
        Row::once("password: 503", Fault::Status(503)).form(Form::Basic, Door::Registry),
    ]
}
