// The server: accepts clients, and gives each a thread.

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <set>
#include <thread>

#include "base/within_memory.h"
#include "qcow/serve.h"
#include "server/nbd/connection.h"
#include "server/nbd/session.h"
#include "server/nbd/tls.h"
#include "server/socket.h"
#include "server/wakeup.h"

namespace qcow {
namespace {

/// How long clients that do not take their replies can hold up the end.
constexpr auto grace = std::chrono::seconds(5);

/// Between two attempts, when there is not enough of something for one more client.
constexpr auto pause = std::chrono::milliseconds(100);

/// Sockets beyond NbdLimits::connections, for clients that have not chosen an export yet, or never will.
constexpr std::size_t anteroom = 64;

/// Places for clients that are past the handshake. Thread-safe.
class Places {
public:
    explicit Places(std::size_t count) : free_(count) {}

    [[nodiscard]] bool any_free() const {
        const std::lock_guard lock(mutex_);
        return free_ > 0;
    }

    /// Waits until there is one. Returns false if nobody gets one any more.
    bool take() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return free_ > 0 || closed_; });
        if (free_ == 0) return false;
        --free_;
        return true;
    }

    void give_back() {
        const std::lock_guard lock(mutex_);
        ++free_;
        changed_.notify_one();
    }

    /// Those who wait go without: it is over.
    void close() {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        changed_.notify_all();
    }

private:
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::size_t free_;
    bool closed_ = false;
};

/// A client's socket, and the place that it takes when it has chosen an export.
class ClientStream final : public SocketStream {
public:
    ClientStream(FileDescriptor fd, std::chrono::seconds patience, Places& places)
        : SocketStream(std::move(fd), patience), places_(places) {}

    void wait_forever() override {
        negotiated_ = true;
        has_place_ = places_.take();
        SocketStream::wait_forever();
    }

    /// For the thread that has served the client.
    void leave() {
        if (has_place_) places_.give_back();
        has_place_ = false;
    }

    [[nodiscard]] bool negotiated() const { return negotiated_; }

private:
    Places& places_;
    std::atomic<bool> negotiated_ = false;
    bool has_place_ = false;
};

class Server final : public NbdServer {
public:
    Server(std::vector<NbdExport> exports, NbdOptions options, std::unique_ptr<nbd::Tls> tls)
        : exports_(std::move(exports)),
          options_(std::move(options)),
          tls_(std::move(tls)),
          places_(options_.limits.connections) {}

    [[nodiscard]] bool usable() const { return wakeup_.fd() >= 0; }

    Result<void> listen_unix(const std::string& path) override {
        return within_memory([&]() -> Result<void> {
            listeners_.push_back(TRY(qcow::listen_unix(path)));
            return {};
        });
    }

    Result<std::uint16_t> listen_tcp(const std::string& host, std::uint16_t port) override {
        return within_memory([&]() -> Result<std::uint16_t> {
            auto made = TRY(qcow::listen_tcp(host, port));
            for (auto& listener : made.listeners) listeners_.push_back(std::move(listener));
            return made.port;
        });
    }

    Result<void> listen_inherited(int fd) override {
        return within_memory([&]() -> Result<void> {
            listeners_.push_back(TRY(qcow::listen_inherited(fd)));
            return {};
        });
    }

    Result<void> run() override;

    void stop() noexcept override {
        stopping_ = true;
        wakeup_.ring();
    }

private:
    struct Client {
        Client(FileDescriptor fd, std::chrono::seconds patience, Places& places)
            : stream(std::move(fd), patience, places) {}
        ClientStream stream;
        bool dismissed = false;
        std::atomic<bool> gone = false;
        std::thread thread;
    };

    [[nodiscard]] bool has_room() const { return clients_.size() < options_.limits.connections + anteroom; }
    [[nodiscard]] bool takes_clients();
    Client* longest_negotiating();
    Result<void> accept_clients();
    Result<void> accept_from(const Listener& listener);
    void part_with_those_gone();
    void part_with_all();

    std::vector<NbdExport> exports_;
    NbdOptions options_;
    std::unique_ptr<nbd::Tls> tls_;  // nullptr: none
    Wakeup wakeup_;
    std::atomic<bool> stopping_ = false;
    std::vector<Listener> listeners_;
    Places places_;
    std::list<Client> clients_;  // who came first is in front
};

Result<void> Server::run() {
    auto result = within_memory([&] { return accept_clients(); });
    listeners_.clear();
    part_with_all();
    for (const auto& exported : exports_) {
        if (exported.read_only) continue;
        auto flushed = within_memory([&] { return exported.disk->flush(); });
        if (result) result = std::move(flushed);
    }
    return result;
}

Result<void> Server::accept_clients() {
    bool had_clients = false;
    std::vector<pollfd> polled;
    polled.reserve(1 + listeners_.size());
    while (!stopping_) {
        part_with_those_gone();
        if (had_clients && clients_.empty() && !options_.persistent) return {};
        polled.assign(1, {wakeup_.fd(), POLLIN, 0});
        if (takes_clients())
            for (const auto& listener : listeners_) polled.push_back({listener.fd(), POLLIN, 0});
        if (poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR)
            return system_error("cannot wait for clients", "server", errno);
        wakeup_.quiet();
        for (std::size_t i = 1; i < polled.size(); ++i) {
            if (polled[i].revents == 0 || !takes_clients()) continue;
            if (!has_room()) {
                // It is accepted when this one has gone.
                if (auto* const slow = longest_negotiating()) {
                    slow->dismissed = true;
                    slow->stream.shutdown();
                }
                continue;
            }
            if (auto accepted = within_memory([&] { return accept_from(listeners_[i - 1]); }); !accepted) {
                if (accepted.error().code != Errc::no_memory) return accepted;
                std::this_thread::sleep_for(pause);
            }
        }
        had_clients |= !clients_.empty();
    }
    return {};
}

/// Whoever comes when all places are taken waits in the backlog. Else there is room, or soon will be: one that has not
/// chosen an export yet makes way, so that those who never choose one keep nobody out.
bool Server::takes_clients() {
    if (!places_.any_free()) return false;
    if (has_room()) return true;
    const bool one_leaves = std::ranges::any_of(clients_, &Client::dismissed);
    return !one_leaves && longest_negotiating() != nullptr;
}

Server::Client* Server::longest_negotiating() {
    const auto found = std::ranges::find_if(clients_, [](const Client& client) { return !client.stream.negotiated(); });
    return found == clients_.end() ? nullptr : &*found;
}

Result<void> Server::accept_from(const Listener& listener) {
    FileDescriptor fd(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
    if (fd.get() < 0) {
        // What befell this one client, or passes, is no reason to leave the others.
        if (errno == EBADF || errno == EINVAL || errno == ENOTSOCK || errno == EOPNOTSUPP)
            return system_error("cannot accept clients", "server", errno);
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)
            std::this_thread::sleep_for(pause);
        return {};
    }
    auto& client =
        clients_.emplace_back(std::move(fd), std::chrono::seconds(options_.limits.handshake_seconds), places_);
    try {
        client.thread = std::thread([this, &client] {
            nbd::serve_client(client.stream, exports_, options_.limits, tls_.get());
            client.stream.leave();
            client.gone = true;
            wakeup_.ring();
        });
    } catch (const std::exception&) {
        clients_.pop_back();  // no more threads, or no memory, to be had: the client sees a closed connection
    }
    return {};
}

void Server::part_with_those_gone() {
    std::erase_if(clients_, [](Client& client) {
        if (!client.gone) return false;
        client.thread.join();
        return true;
    });
}

void Server::part_with_all() {
    const auto deadline = std::chrono::steady_clock::now() + grace;
    places_.close();
    for (auto& client : clients_) client.stream.stop_receiving();
    for (;;) {
        part_with_those_gone();
        if (clients_.empty()) return;
        const auto left =
            std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
        if (left.count() <= 0) break;
        pollfd polled = {wakeup_.fd(), POLLIN, 0};
        poll(&polled, 1, static_cast<int>(left.count()));
        wakeup_.quiet();
    }
    for (auto& client : clients_) {
        client.stream.shutdown();
        client.thread.join();
    }
    clients_.clear();
}

Result<std::unique_ptr<NbdServer>> make_server(std::vector<NbdExport> exports, const NbdOptions& options) {
    if (exports.empty()) return fail(Errc::invalid_argument, "server", "there is nothing to serve");
    std::set<std::string_view> names;
    for (const auto& exported : exports) {
        if (exported.name.size() > nbd::max_string || exported.description.size() > nbd::max_string) {
            return fail(Errc::invalid_argument, "server",
                        fmt::format("names and descriptions of exports have at most {} bytes", nbd::max_string));
        }
        if (!names.insert(exported.name).second) {
            return fail(Errc::invalid_argument, "server",
                        fmt::format("two exports have the name \"{}\"; give each one of its own", exported.name));
        }
    }
    for (auto& exported : exports) {
        auto contexts = nbd::built_in_contexts(exported);
        exported.contexts.insert(exported.contexts.begin(), contexts.begin(), contexts.end());
    }
    std::unique_ptr<nbd::Tls> tls;
    if (options.tls) tls = TRY(nbd::Tls::load(*options.tls));
    auto server = std::make_unique<Server>(std::move(exports), options, std::move(tls));
    if (!server->usable()) return system_error("cannot be made", "server", errno);
    return server;
}

}  // namespace

Result<std::unique_ptr<NbdServer>> NbdServer::make(std::vector<NbdExport> exports, const NbdOptions& options) {
    return within_memory([&] { return make_server(std::move(exports), options); });
}

}  // namespace qcow
