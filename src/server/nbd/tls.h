#pragma once
// TLS: what a server proves itself with, and connections that it protects.

#include <memory>

#include "qcow/serve.h"
#include "server/stream.h"

namespace qcow::nbd {

/// The two directions of another Stream, encrypted. Whoever speaks anything but TLS, or is not who it must be, is gone.
class TlsStream : public Stream {
public:
    /// Comes before everything else. Returns false if the client cannot be served.
    virtual bool shake_hands() = 0;

    /// Tells the client that nothing more will come, so that it does not take that for an attack. Only when nobody
    /// sends or receives any more.
    virtual void say_goodbye() = 0;
};

/// Keys and certificates, loaded once. Safe to use from any number of threads.
class Tls {
public:
    /// Errc::invalid_argument, Errc::not_found, ...: names the file and what it should be; Errc::unsupported: this
    /// library was built without TLS.
    static Result<std::unique_ptr<Tls>> load(const NbdTls& files);

    Tls(const Tls&) = delete;
    Tls& operator=(const Tls&) = delete;
    virtual ~Tls() = default;

    /// Neither `below` nor this may go before it.
    [[nodiscard]] virtual std::unique_ptr<TlsStream> over(Stream& below) const = 0;

protected:
    Tls() = default;
};

}  // namespace qcow::nbd
