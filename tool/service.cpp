#include "service.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "command.h"

namespace tool {
namespace {

std::function<void()> stop_service;

void handle_ending_signals(void (*handler)(int)) {
    struct sigaction action = {};
    action.sa_handler = handler;
    for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaction(signal, &action, nullptr);
}

}  // namespace

void add_sandbox_options(CLI::App& app, Sandbox& sandbox) {
    one_of(app.add_option("--sandbox", sandbox.mode,
                          "How to confine the process. auto: as far as this system can; on: completely, or fail; off: "
                          "not at all"),
           {"auto", "on", "off"})
        ->capture_default_str();
    app.add_option("--user", sandbox.user, "Switch to this user when everything is open; only root can")
        ->type_name("NAME")
        ->check(name_text);
}

ServiceManager::ServiceManager() {
    const char* path = std::getenv("NOTIFY_SOCKET");
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    if (path == nullptr || std::strlen(path) >= sizeof address.sun_path) return;
    std::memcpy(address.sun_path, path, std::strlen(path) + 1);
    if (address.sun_path[0] == '@') address.sun_path[0] = '\0';  // the abstract name space
    fd_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + std::strlen(path));
    connected_ = fd_ >= 0 && connect(fd_, reinterpret_cast<const sockaddr*>(&address), length) == 0;
}

ServiceManager::~ServiceManager() {
    if (fd_ >= 0) close(fd_);
}

void ServiceManager::tell(const std::string& state) const {
    if (connected_) send(fd_, state.data(), state.size(), MSG_NOSIGNAL);
}

PidFile::~PidFile() {
    if (!path_.empty()) unlink(path_.c_str());
}

qcow::Result<void> PidFile::write(const std::string& path) {
    const auto failure = [&] {
        return std::unexpected(
            qcow::Error{qcow::Errc::io, path, fmt::format("cannot write: {}", std::strerror(errno))});
    };
    auto* file = std::fopen(path.c_str(), "w");
    if (file == nullptr) return failure();
    path_ = path;
    fmt::print(file, "{}\n", getpid());
    if (std::fclose(file) != 0) return failure();
    return {};
}

StopServiceOnSignals::StopServiceOnSignals(std::function<void()> stop) {
    stop_service = std::move(stop);
    handle_ending_signals([](int) { stop_service(); });
}

StopServiceOnSignals::~StopServiceOnSignals() { handle_ending_signals(SIG_DFL); }

}  // namespace tool
