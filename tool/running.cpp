#include "running.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "failure.h"
#include "qcow/text.h"

namespace tool {
namespace {

/// A connection to the control socket of a server.
class Connection {
public:
    explicit Connection(std::string path)
        : path_(std::move(path)), fd_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {}
    Connection(const Connection&) = delete;
    Connection& operator=(const Connection&) = delete;
    ~Connection() {
        if (fd_ >= 0) close(fd_);
    }

    qcow::Result<void> open() {
        sockaddr_un address = {};
        address.sun_family = AF_UNIX;
        if (path_.size() >= sizeof address.sun_path)
            return failure(qcow::Errc::invalid_argument, path_, "the path of a socket has at most 107 bytes");
        std::memcpy(address.sun_path, path_.data(), path_.size());
        if (connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return {};
        return failure(qcow::Errc::io, path_,
                       fmt::format("cannot connect: {}; is it the --control socket of a running qcow serve?",
                                   std::strerror(errno)));
    }

    qcow::Result<void> send(std::string line) {
        line += '\n';
        for (std::string_view rest = line; !rest.empty();) {
            const auto sent = ::send(fd_, rest.data(), rest.size(), MSG_NOSIGNAL);
            if (sent < 0 && errno == EINTR) continue;
            if (sent < 0) return failure(qcow::Errc::io, path_, fmt::format("cannot send: {}", std::strerror(errno)));
            rest.remove_prefix(static_cast<std::size_t>(sent));
        }
        return {};
    }

    qcow::Result<Json> receive() {
        while (received_.find('\n') == std::string::npos) {
            char bytes[4096];
            const auto n = recv(fd_, bytes, sizeof bytes, 0);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return failure(qcow::Errc::io, path_, "the server has closed the connection without an answer");
            received_.append(bytes, static_cast<std::size_t>(n));
        }
        const auto end = received_.find('\n');
        auto answer = Json::parse(received_.substr(0, end), nullptr, false);
        received_.erase(0, end + 1);
        if (!answer.is_object())
            return failure(qcow::Errc::io, path_, "the answer is not JSON; it is not the control socket of qcow serve");
        return answer;
    }

private:
    std::string path_;
    int fd_;
    std::string received_;
};

}  // namespace

void add_running_options(CLI::App& app, Running& running) {
    auto* socket =
        app.add_option("--control", running.socket,
                       "In place of IMAGE: the control socket of the server (qcow serve --control) that has\n"
                       "the image open")
            ->type_name("SOCKET")
            ->check(name_text);
    app.add_option("--image-name", running.image, "With --control: the image, if the server has several")
        ->type_name("NAME")
        ->needs(socket);
}

qcow::Result<std::string> value_without_image(const Running& running, const std::string& image,
                                              const std::string& value, const std::string& what) {
    if (running.named() && !value.empty())
        return failure(qcow::Errc::invalid_argument, image,
                       "--control stands in place of IMAGE; leave one of them out");
    const auto& given = running.named() ? image : value;
    if (given.empty()) {
        return failure(qcow::Errc::invalid_argument, "",
                       image.empty() && !running.named() ? "IMAGE and " + what + " are missing" : what + " is missing");
    }
    return given;
}

qcow::Result<Json> execute(const std::string& socket, const std::string& command, const Json& arguments) {
    Connection connection(socket);
    QCOW_TRY_VOID(connection.open());
    QCOW_TRY(connection.receive());  // the greeting
    const Json message = {{"execute", command}, {"arguments", arguments}};
    QCOW_TRY_VOID(connection.send(message.dump(-1, ' ', false, Json::error_handler_t::replace)));
    const auto answer = QCOW_TRY(connection.receive());
    if (const auto error = answer.find("error"); error != answer.end() && error->is_object())
        return failure(qcow::Errc::io, "", error->value("desc", "the server gives no reason"));
    return answer.value("return", Json());
}

qcow::Result<Json> execute(const Running& running, const std::string& command, Json arguments) {
    if (!running.image.empty()) arguments["node-name"] = running.image;
    return execute(running.socket, command, arguments);
}

qcow::Result<Json> query(const Running& running) {
    const auto images = QCOW_TRY(execute(running.socket, "query-named-block-nodes", Json::object()));
    if (running.image.empty() && images.size() == 1) return images.front();
    for (const auto& image : images) {
        if (image.value("node-name", "") == running.image) return image;
    }
    return failure(qcow::Errc::invalid_argument, running.socket,
                   running.image.empty()
                       ? "the server has several images; name one with --image-name"
                       : fmt::format("the server has no image \"{}\"", qcow::printable(running.image)));
}

}  // namespace tool
