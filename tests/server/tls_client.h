#pragma once
// The client that says exactly what a test wants it to say, through TLS.

#include <gnutls/gnutls.h>

#include <memory>

#include "server/nbd_client.h"

namespace qcow::test {

/// What a client has to show, and wants to see. What is empty is not used.
struct Wallet {
    std::string trusted = {};      ///< the file of who signed the server's certificate; empty: any will do
    std::string certificate = {};  ///< files, both or none
    std::string key = {};
    std::string psk_name = {};
    std::string psk = {};  ///< in hexadecimal
    std::string priority = "NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK";
};

/// The client's end of TLS on a socket, which is somebody else's.
class TlsEnd {
public:
    /// Throws where the server does not want this client.
    TlsEnd(int fd, const Wallet& wallet);
    TlsEnd(const TlsEnd&) = delete;
    TlsEnd& operator=(const TlsEnd&) = delete;
    ~TlsEnd();

    void send(std::span<const std::byte> bytes);

    Bytes receive(std::size_t count);

    /// New keys for this side, and the other side is asked for its own.
    void update_keys() { check(gnutls_session_key_update(session_, GNUTLS_KU_PEER)); }

    /// The result of another handshake, as TLS 1.2 had them.
    int renegotiate() { return gnutls_handshake(session_); }

    /// Whether the end of what was received was an orderly one.
    [[nodiscard]] bool told_of_end() const { return told_of_end_; }

    [[nodiscard]] std::string version() const;

private:
    explicit TlsEnd(int fd);

    void check(int error);

    gnutls_session_t session_ = nullptr;
    gnutls_certificate_credentials_t certificates_ = nullptr;
    gnutls_psk_client_credentials_t psk_ = nullptr;
    bool told_of_end_ = false;
};

/// The whole client, which can change to TLS.
class TlsNbdClient : public NbdClient {
public:
    using NbdClient::NbdClient;

    /// Behind the greeting.
    void start_tls(const Wallet& wallet);
    /// Behind STARTTLS.
    void begin_tls(const Wallet& wallet) { tls_ = std::make_unique<TlsEnd>(fd_, wallet); }

    void send(std::span<const std::byte> bytes) const override { tls_ ? tls_->send(bytes) : NbdClient::send(bytes); }
    using NbdClient::send;
    [[nodiscard]] Bytes receive(std::size_t count) const override;

    TlsEnd& tls() { return *tls_; }

private:
    std::unique_ptr<TlsEnd> tls_;
};

}  // namespace qcow::test
