#include "server/tls_client.h"

namespace qcow::test {

TlsEnd::TlsEnd(int fd, const Wallet& wallet) : TlsEnd(fd) {
    check(gnutls_priority_set_direct(session_, wallet.priority.c_str(), nullptr));
    if (!wallet.certificate.empty()) {
        check(gnutls_certificate_set_x509_key_file(certificates_, wallet.certificate.c_str(), wallet.key.c_str(),
                                                   GNUTLS_X509_FMT_PEM));
    }
    if (!wallet.trusted.empty()) {
        check(gnutls_certificate_set_x509_trust_file(certificates_, wallet.trusted.c_str(), GNUTLS_X509_FMT_PEM));
        gnutls_session_set_verify_cert(session_, "localhost", 0);
    }
    if (wallet.psk.empty()) {
        check(gnutls_credentials_set(session_, GNUTLS_CRD_CERTIFICATE, certificates_));
    } else {
        auto digits = wallet.psk;
        const gnutls_datum_t key = {reinterpret_cast<unsigned char*>(digits.data()),
                                    static_cast<unsigned>(digits.size())};
        check(gnutls_psk_set_client_credentials(psk_, wallet.psk_name.c_str(), &key, GNUTLS_PSK_KEY_HEX));
        check(gnutls_credentials_set(session_, GNUTLS_CRD_PSK, psk_));
    }
    check(gnutls_handshake(session_));
}

TlsEnd::~TlsEnd() {
    gnutls_deinit(session_);
    gnutls_certificate_free_credentials(certificates_);
    gnutls_psk_free_client_credentials(psk_);
}

void TlsEnd::send(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
        const auto n = gnutls_record_send(session_, bytes.data(), bytes.size());
        if (n <= 0) throw Closed();
        bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
}

Bytes TlsEnd::receive(std::size_t count) {
    Bytes bytes(count);
    for (std::size_t done = 0; done < count;) {
        const auto n = gnutls_record_recv(session_, bytes.data() + done, count - done);
        // Where there was a key update, there may be more.
        if (n == GNUTLS_E_AGAIN && errno != EAGAIN) continue;
        if (n == GNUTLS_E_AGAIN) throw std::runtime_error("the server does not answer");
        told_of_end_ = n == 0;
        if (n <= 0) throw Closed();
        done += static_cast<std::size_t>(n);
    }
    return bytes;
}

std::string TlsEnd::version() const { return gnutls_protocol_get_name(gnutls_protocol_get_version(session_)); }

TlsEnd::TlsEnd(int fd) {
    // A certificate is shown whomever the server would rather see.
    gnutls_init(&session_, GNUTLS_CLIENT | GNUTLS_NO_SIGNAL | GNUTLS_FORCE_CLIENT_CERT);
    gnutls_certificate_allocate_credentials(&certificates_);
    gnutls_psk_allocate_client_credentials(&psk_);
    gnutls_transport_set_int(session_, fd);
}

void TlsEnd::check(int error) {
    if (error == GNUTLS_E_FATAL_ALERT_RECEIVED)
        throw std::runtime_error(gnutls_alert_get_name(gnutls_alert_get(session_)));
    if (error < 0) throw std::runtime_error(gnutls_strerror(error));
}

void TlsNbdClient::start_tls(const Wallet& wallet) {
    if (outcome(nbd::Option::starttls) != nbd::OptionReply::ack) throw std::runtime_error("STARTTLS was refused");
    begin_tls(wallet);
}

Bytes TlsNbdClient::receive(std::size_t count) const { return tls_ ? tls_->receive(count) : NbdClient::receive(count); }

}  // namespace qcow::test
