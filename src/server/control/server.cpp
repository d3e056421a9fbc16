// The server for Control: one thread, lines in and lines out.

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <list>

#include "base/within_memory.h"
#include "qcow/control.h"
#include "server/socket.h"
#include "server/wakeup.h"

namespace qcow {
namespace {

/// One more, and the client that was silent for the longest time is cut off.
constexpr std::size_t max_clients = 16;
constexpr auto patience = std::chrono::seconds(5);

class Client {
public:
    explicit Client(FileDescriptor fd) : fd_(std::move(fd)) {}

    [[nodiscard]] int fd() const { return fd_.get(); }
    /// When something came last.
    [[nodiscard]] std::chrono::steady_clock::time_point heard() const { return heard_; }

    /// Sends a line. Returns whether the client took all of it.
    [[nodiscard]] bool send(std::string line) const {
        line += '\n';
        const auto deadline = std::chrono::steady_clock::now() + patience;
        for (std::string_view rest = line; !rest.empty();) {
            const auto sent = ::send(fd(), rest.data(), rest.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent > 0) {
                rest.remove_prefix(static_cast<std::size_t>(sent));
                continue;
            }
            if (sent < 0 && errno != EAGAIN && errno != EINTR) return false;
            const auto left =
                std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
            if (left.count() <= 0) return false;
            pollfd polled = {fd(), POLLOUT, 0};
            poll(&polled, 1, static_cast<int>(left.count()));
        }
        return true;
    }

    /// Takes what has arrived, and answers each full line. Returns whether the client is still there.
    [[nodiscard]] bool serve(Control& control) {
        char bytes[4096];
        const auto received = recv(fd(), bytes, sizeof bytes, MSG_DONTWAIT);
        if (received < 0) return errno == EAGAIN || errno == EINTR;
        if (received == 0) return false;
        heard_ = std::chrono::steady_clock::now();
        line_.append(bytes, static_cast<std::size_t>(received));
        for (std::size_t end = line_.find('\n'); end != std::string::npos; end = line_.find('\n')) {
            const auto command = line_.substr(0, end);
            line_.erase(0, end + 1);
            if (command.find_first_not_of(" \t\r") == std::string::npos) continue;
            if (!send(control.execute(command))) return false;
        }
        if (line_.size() <= Control::max_command) return true;
        static_cast<void>(send(control.execute(line_)));  // which says that it is too long
        return false;
    }

private:
    FileDescriptor fd_;
    std::string line_;  // as far as it has arrived
    std::chrono::steady_clock::time_point heard_ = std::chrono::steady_clock::now();
};

class Server final : public ControlServer {
public:
    Server(Listener listener, Control& control) : listener_(std::move(listener)), control_(control) {}

    [[nodiscard]] bool usable() const { return wakeup_.fd() >= 0; }

    Result<void> run() override {
        return within_memory([&] { return serve(); });
    }

    void stop() noexcept override {
        stopping_ = true;
        wakeup_.ring();
    }

private:
    Result<void> serve() {
        std::vector<pollfd> polled;
        while (!stopping_) {
            polled.assign(1, {wakeup_.fd(), POLLIN, 0});
            for (const auto& client : clients_) polled.push_back({client.fd(), POLLIN, 0});
            polled.push_back({listener_.fd(), POLLIN, 0});
            if (poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR)
                return system_error("cannot wait for clients", "control socket", errno);
            wakeup_.quiet();
            auto ready = polled.begin() + 1;
            for (auto client = clients_.begin(); client != clients_.end() && !stopping_; ++ready) {
                const bool stays = ready->revents == 0 || client->serve(control_);
                client = stays ? std::next(client) : clients_.erase(client);
            }
            if (!stopping_ && ready->revents != 0) accept_client();
        }
        return {};
    }

    void accept_client() {
        FileDescriptor fd(accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC));
        if (fd.get() < 0) return;
        if (clients_.size() == max_clients) clients_.erase(std::ranges::min_element(clients_, {}, &Client::heard));
        clients_.emplace_back(std::move(fd));
        if (!clients_.back().send(Control::greeting())) clients_.pop_back();
    }

    Listener listener_;
    Control& control_;
    Wakeup wakeup_;
    std::atomic<bool> stopping_ = false;
    std::list<Client> clients_;
};

}  // namespace

Result<std::unique_ptr<ControlServer>> ControlServer::listen_unix(const std::string& path, Control& control) {
    return within_memory([&]() -> Result<std::unique_ptr<ControlServer>> {
        auto listener = TRY(qcow::listen_unix(path, Admits::owner_only));
        auto server = std::make_unique<Server>(std::move(listener), control);
        if (!server->usable()) return system_error("cannot be made", "control server", errno);
        return server;
    });
}

}  // namespace qcow
