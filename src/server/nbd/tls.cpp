#include "server/nbd/tls.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "storage/file.h"

namespace qcow::nbd {
namespace {

/// What has arrived and is not decrypted yet, at most.
constexpr std::size_t received_bytes = std::size_t{128} << 10;
/// Large data leaves in pieces of about so much, so that the client decrypts one while the next is encrypted.
constexpr std::size_t sent_bytes = std::size_t{64} << 10;

/// No file of keys is larger.
constexpr std::size_t max_file = std::size_t{16} << 20;

constexpr const char* make_certificates = "certtool makes it, as QEMU's manual shows (\"TLS setup\")";
constexpr const char* make_psk = "\"psktool -u NAME -p FILE\" makes such lines";

struct Free {
    void operator()(gnutls_certificate_credentials_t it) const { gnutls_certificate_free_credentials(it); }
    void operator()(gnutls_psk_server_credentials_t it) const { gnutls_psk_free_server_credentials(it); }
    void operator()(gnutls_priority_t it) const { gnutls_priority_deinit(it); }
    void operator()(gnutls_session_t it) const { gnutls_deinit(it); }
    void operator()(gnutls_x509_privkey_t it) const { gnutls_x509_privkey_deinit(it); }
};
template <class T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, Free>;

/// What one of GnuTLS's functions makes; nothing when it is out of memory.
template <class T, class... Arguments, class... Given>
Owned<T> make(int (*function)(T*, Arguments...), Given... given) {
    T made = nullptr;
    return Owned<T>(function(&made, given...) < 0 ? nullptr : made);
}

gnutls_datum_t as_datum(std::string& text) {
    return {reinterpret_cast<unsigned char*>(text.data()), static_cast<unsigned>(text.size())};
}

Result<std::string> read_file(const std::string& path, std::string_view remedy) {
    const FileDescriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    std::string text;
    std::array<char, 4096> piece = {};
    ssize_t n = 0;
    while (fd.get() >= 0 && (n = read(fd.get(), piece.data(), piece.size())) > 0 && text.size() <= max_file)
        text.append(piece.data(), static_cast<std::size_t>(n));
    if (fd.get() < 0 || n < 0) {
        auto error = system_error("cannot read", path, errno).error();
        return fail(error.code, error.place, fmt::format("{}; {}", error.what, remedy));
    }
    if (n > 0) return fail(Errc::limit_exceeded, path, fmt::format("is too large; {}", remedy));
    return text;
}

std::unexpected<Error> bad_file(const std::string& path, int error, std::string_view remedy) {
    return fail(Errc::invalid_argument, path, fmt::format("{} {}", gnutls_strerror(error), remedy));
}

/// Keys by the names of those who have them.
using Keys = std::map<std::string, std::string, std::less<>>;

Result<Keys> parse_keys(const std::string& path, std::string_view text) {
    Keys keys;
    for (unsigned line_number = 1; !text.empty(); ++line_number) {
        auto line = text.substr(0, text.find('\n'));
        text.remove_prefix(std::min(text.size(), line.size() + 1));
        if (line.ends_with('\r')) line.remove_suffix(1);
        if (line.empty()) continue;
        const auto colon = line.find(':');
        const auto bad = [&](const char* what) {
            return fail(Errc::invalid_argument, fmt::format("{}: line {}", path, line_number),
                        fmt::format("{}; {}", what, make_psk));
        };
        if (colon == 0 || colon == std::string_view::npos) return bad("is not NAME:KEY");
        std::string hexadecimal(line.substr(colon + 1));
        std::string key(hexadecimal.size() / 2, '\0');
        auto size = key.size();
        const auto digits = as_datum(hexadecimal);
        if (hexadecimal.empty() || hexadecimal.size() % 2 != 0 || gnutls_hex_decode(&digits, key.data(), &size) < 0 ||
            size != key.size())
            return bad("its key is not a number in hexadecimal with two digits a byte");
        if (!keys.emplace(line.substr(0, colon), std::move(key)).second) return bad("has a name for the second time");
    }
    if (keys.empty()) return fail(Errc::invalid_argument, path, fmt::format("has no keys; {}", make_psk));
    return keys;
}

class Credentials final : public Tls {
public:
    Result<void> take_certificates(const std::string& directory, bool verify_peer);
    Result<void> take_keys(const std::string& path);

    [[nodiscard]] std::unique_ptr<TlsStream> over(Stream& below) const override;

    /// A new session of this server; nothing when there is no memory for it.
    [[nodiscard]] Owned<gnutls_session_t> make_session() const;

private:
    Result<void> set_priority(const char* text);
    static int find_key(gnutls_session_t session, const char* name, gnutls_datum_t* key);

    Owned<gnutls_priority_t> priority_;
    Owned<gnutls_certificate_credentials_t> certificates_;
    bool verify_peer_ = false;
    std::string client_ = GNUTLS_KP_TLS_WWW_CLIENT;
    /// What clients' certificates must be good for. Sessions refer to it, so it does not change any more.
    mutable gnutls_typed_vdata_st purpose_ = {GNUTLS_DT_KEY_PURPOSE_OID, as_datum(client_).data, 0};
    Owned<gnutls_psk_server_credentials_t> psk_;
    Keys keys_;
};

Result<void> Credentials::set_priority(const char* text) {
    priority_ = make(gnutls_priority_init, text, nullptr);
    if (priority_ == nullptr) return fail(Errc::unsupported, "TLS", "GnuTLS cannot be set up");
    return {};
}

Result<void> Credentials::take_certificates(const std::string& directory, bool verify_peer) {
    TRY_VOID(set_priority("NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"));
    certificates_ = make(gnutls_certificate_allocate_credentials);
    if (certificates_ == nullptr) return fail(Errc::no_memory, "TLS", "out of memory");
    auto* const credentials = certificates_.get();

    const auto certificate_file = directory + "/server-cert.pem";
    const auto key_file = directory + "/server-key.pem";
    auto certificate = TRY(read_file(certificate_file, make_certificates));
    auto key = TRY(read_file(key_file, make_certificates));
    const auto certificate_datum = as_datum(certificate);
    const auto key_datum = as_datum(key);
    const auto alone = make(gnutls_x509_privkey_init);
    if (const int error = gnutls_x509_privkey_import2(alone.get(), &key_datum, GNUTLS_X509_FMT_PEM, nullptr, 0);
        error < 0)
        return bad_file(key_file, error, "It must be a key in PEM form, without a password.");
    const int error = gnutls_certificate_set_x509_key_mem2(credentials, &certificate_datum, &key_datum,
                                                           GNUTLS_X509_FMT_PEM, nullptr, 0);
    if (error == GNUTLS_E_CERTIFICATE_KEY_MISMATCH)
        return fail(Errc::invalid_argument, key_file, "is not the key of server-cert.pem; take the one it was made of");
    if (error < 0) return bad_file(certificate_file, error, "It must be a certificate in PEM form.");

    verify_peer_ = verify_peer;
    if (!verify_peer) return {};
    const auto ca_file = directory + "/ca-cert.pem";
    auto ca = TRY(read_file(ca_file, make_certificates));
    const auto ca_datum = as_datum(ca);
    const int trusted = gnutls_certificate_set_x509_trust_mem(credentials, &ca_datum, GNUTLS_X509_FMT_PEM);
    if (trusted <= 0) {
        return bad_file(ca_file, trusted == 0 ? GNUTLS_E_NO_CERTIFICATE_FOUND : trusted,
                        "It must be the certificate, in PEM form, of who signs those of clients.");
    }
    // Who has been locked out again: the file need not be there.
    const auto crl_file = directory + "/ca-crl.pem";
    auto crl = read_file(crl_file, "it lists the certificates that have been revoked");
    if (!crl) return crl.error().code == Errc::not_found ? Result<void>() : std::unexpected(std::move(crl).error());
    const auto crl_datum = as_datum(*crl);
    const int revoked = gnutls_certificate_set_x509_crl_mem(credentials, &crl_datum, GNUTLS_X509_FMT_PEM);
    if (revoked < 0) return bad_file(crl_file, revoked, "It must be a list of revoked certificates in PEM form.");
    return {};
}

Result<void> Credentials::take_keys(const std::string& path) {
    TRY_VOID(set_priority("NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:+ECDHE-PSK:+DHE-PSK:+PSK"));
    keys_ = TRY(parse_keys(path, TRY(read_file(path, make_psk))));
    psk_ = make(gnutls_psk_allocate_server_credentials);
    if (psk_ == nullptr) return fail(Errc::no_memory, "TLS", "out of memory");
    gnutls_psk_set_server_credentials_function(psk_.get(), find_key);
    return {};
}

int Credentials::find_key(gnutls_session_t session, const char* name, gnutls_datum_t* key) {
    const auto& keys = static_cast<const Credentials*>(gnutls_session_get_ptr(session))->keys_;
    const auto found = keys.find(std::string_view(name));
    // A name that nobody has gets a key that nobody has, so that names cannot be found out.
    const auto size = found == keys.end() ? 32 : found->second.size();
    key->data = static_cast<unsigned char*>(gnutls_malloc(size));
    key->size = static_cast<unsigned>(size);
    if (key->data == nullptr) return -1;
    if (found == keys.end()) return gnutls_rnd(GNUTLS_RND_KEY, key->data, size) < 0 ? -1 : 0;
    std::memcpy(key->data, found->second.data(), size);
    return 0;
}

Owned<gnutls_session_t> Credentials::make_session() const {
    // Sessions are not resumed: a connection lives long, and tickets would be kept by who has been locked out.
    auto made = make(gnutls_init, unsigned{GNUTLS_SERVER | GNUTLS_NONBLOCK | GNUTLS_NO_TICKETS});
    if (made == nullptr || gnutls_priority_set(made.get(), priority_.get()) < 0) return nullptr;
    gnutls_session_set_ptr(made.get(), const_cast<Credentials*>(this));
    const int error = psk_ != nullptr ? gnutls_credentials_set(made.get(), GNUTLS_CRD_PSK, psk_.get())
                                      : gnutls_credentials_set(made.get(), GNUTLS_CRD_CERTIFICATE, certificates_.get());
    if (error < 0) return nullptr;
    if (verify_peer_) {
        gnutls_certificate_server_set_request(made.get(), GNUTLS_CERT_REQUIRE);
        gnutls_session_set_verify_cert2(made.get(), &purpose_, 1, 0);
    }
    return made;
}

/// GnuTLS lets two threads share a session, one for each direction, but not while keys are changed, which either side
/// may do at any time and GnuTLS does by itself after so many records. So the session has a lock, and nobody waits for
/// the network while holding it: the session's own input and output are in memory.
class Session final : public TlsStream {
public:
    Session(const Credentials& credentials, Stream& below)
        : below_(below), received_(received_bytes), session_(credentials.make_session()) {
        if (session_ == nullptr) return;
        gnutls_transport_set_ptr(session_.get(), this);
        gnutls_transport_set_pull_function(session_.get(), [](gnutls_transport_ptr_t self, void* to, std::size_t size) {
            return static_cast<Session*>(self)->pull(to, size);
        });
        gnutls_transport_set_vec_push_function(session_.get(),
                                               [](gnutls_transport_ptr_t self, const giovec_t* pieces, int count) {
                                                   return static_cast<Session*>(self)->push(pieces, count);
                                               });
    }

    bool shake_hands() override;
    std::size_t receive(std::span<std::byte> to) override;
    bool send(std::span<const std::byte> bytes) override;
    void say_goodbye() override;
    void wait_forever() override { below_.wait_forever(); }
    void shutdown() override { below_.shutdown(); }

private:
    ssize_t pull(void* to, std::size_t size);
    ssize_t push(const giovec_t* pieces, int count);
    [[nodiscard]] bool all_decrypted() const { return begin_ == end_; }
    bool fetch();
    bool send_encrypted();

    Stream& below_;

    // The receiver's.
    std::vector<std::byte> received_;
    std::size_t begin_ = 0;
    std::size_t end_ = 0;
    bool ended_ = false;

    // The sender's.
    std::vector<std::byte> leaving_;

    std::mutex mutex_;  // of these
    Owned<gnutls_session_t> session_;
    std::vector<std::byte> encrypted_;
};

/// The session takes what has arrived.
ssize_t Session::pull(void* to, std::size_t size) {
    if (all_decrypted()) {
        gnutls_transport_set_errno(session_.get(), EAGAIN);
        return -1;
    }
    size = std::min(size, end_ - begin_);
    std::memcpy(to, received_.data() + begin_, size);
    begin_ += size;
    return static_cast<ssize_t>(size);
}

/// The session gives what is to leave.
ssize_t Session::push(const giovec_t* pieces, int count) {
    const auto before = encrypted_.size();
    try {
        for (const auto& piece : std::span(pieces, static_cast<std::size_t>(count))) {
            const auto* bytes = static_cast<const std::byte*>(piece.iov_base);
            encrypted_.insert(encrypted_.end(), bytes, bytes + piece.iov_len);
        }
    } catch (const std::bad_alloc&) {  // which GnuTLS, being C, knows nothing of
        gnutls_transport_set_errno(session_.get(), ENOMEM);
        return -1;
    }
    return static_cast<ssize_t>(encrypted_.size() - before);
}

/// Waits for more to decrypt.
bool Session::fetch() {
    begin_ = 0;
    end_ = below_.receive(received_);
    return end_ > 0;
}

bool Session::send_encrypted() {
    {
        const std::lock_guard lock(mutex_);
        leaving_.swap(encrypted_);
    }
    const bool sent = leaving_.empty() || below_.send(leaving_);
    leaving_.clear();
    return sent;
}

bool Session::shake_hands() {
    while (session_ != nullptr) {
        const int error = gnutls_handshake(session_.get());
        const bool failed = error < 0 && gnutls_error_is_fatal(error) != 0;
        if (failed) gnutls_alert_send_appropriate(session_.get(), error);
        const bool sent = send_encrypted();
        if (failed || !sent) return false;
        if (error == GNUTLS_E_SUCCESS) return true;
        if (all_decrypted() && !fetch()) return false;
    }
    return false;
}

std::size_t Session::receive(std::span<std::byte> to) {
    std::size_t count = 0;
    while (!ended_ && count < to.size()) {
        const auto n = [&] {
            const std::lock_guard lock(mutex_);
            return gnutls_record_recv(session_.get(), to.data() + count, to.size() - count);
        }();
        if (n > 0) {
            count += static_cast<std::size_t>(n);
        } else if (n == 0 || gnutls_error_is_fatal(static_cast<int>(n)) != 0 || n == GNUTLS_E_REHANDSHAKE) {
            ended_ = true;  // an orderly end, bytes that are not the client's, or another handshake, which there is not
        } else if (all_decrypted()) {
            if (count > 0) break;
            ended_ = !fetch();
        }
    }
    return count;
}

bool Session::send(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
        for (std::size_t collected = 0; !bytes.empty() && collected < sent_bytes;) {
            const std::lock_guard lock(mutex_);
            const auto n = gnutls_record_send(session_.get(), bytes.data(), bytes.size());
            if (n < 0) return false;
            bytes = bytes.subspan(static_cast<std::size_t>(n));
            collected += static_cast<std::size_t>(n);
        }
        if (!send_encrypted()) return false;
    }
    return true;
}

void Session::say_goodbye() {
    {
        const std::lock_guard lock(mutex_);
        gnutls_bye(session_.get(), GNUTLS_SHUT_WR);
    }
    send_encrypted();
}

std::unique_ptr<TlsStream> Credentials::over(Stream& below) const { return std::make_unique<Session>(*this, below); }

}  // namespace

Result<std::unique_ptr<Tls>> Tls::load(const NbdTls& files) {
    if (files.certificates.empty() == files.psk_file.empty())
        return fail(Errc::invalid_argument, "TLS", "takes either a directory of certificates or a file of keys");
    if (files.certificates.empty() && files.verify_peer) {
        return fail(Errc::invalid_argument, files.psk_file,
                    "clients with keys have no certificates to verify; leave that out, or take certificates");
    }
    auto credentials = std::make_unique<Credentials>();
    if (files.psk_file.empty()) {
        TRY_VOID(credentials->take_certificates(files.certificates, files.verify_peer));
    } else {
        TRY_VOID(credentials->take_keys(files.psk_file));
    }
    return credentials;
}

}  // namespace qcow::nbd
