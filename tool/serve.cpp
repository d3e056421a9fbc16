// qcow serve: images for programs that speak NBD.

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "command.h"
#include "qcow/serve.h"
#include "qcow/text.h"
#include "sandbox.h"

namespace tool {
namespace {

struct Options {
    std::vector<std::string> images;
    Source source;  // what all images have in common
    std::vector<std::string> names;
    std::vector<std::string> descriptions;
    std::vector<std::string> bitmaps;
    std::string socket;
    std::string bind;
    std::uint16_t port = 10809;
    std::string pid_file;
    std::string cache = "writeback";
    std::string discard = "unmap";
    qcow::NbdTls tls;
    unsigned connections = qcow::NbdLimits().connections;
    Sandbox sandbox;
    bool port_given = false;
    bool read_only = false;
    bool persistent = false;
    bool allocation_depth = false;
};

std::unexpected<qcow::Error> system_failure(const std::string& place, const std::string& what) {
    return std::unexpected(qcow::Error{qcow::Errc::io, place, fmt::format("{}: {}", what, std::strerror(errno))});
}

/// How many sockets a service manager hands over, from file descriptor 3 on.
int inherited_sockets() {
    const auto number = [](const char* name) {
        const char* text = std::getenv(name);
        return text == nullptr ? 0 : std::atoi(text);
    };
    return number("LISTEN_PID") == getpid() ? std::max(0, number("LISTEN_FDS")) : 0;
}

/// The service manager, if there is one that wants to know.
class ServiceManager {
public:
    ServiceManager() {
        const char* path = std::getenv("NOTIFY_SOCKET");
        sockaddr_un address = {};
        address.sun_family = AF_UNIX;
        if (path == nullptr || std::strlen(path) >= sizeof address.sun_path) return;
        std::memcpy(address.sun_path, path, std::strlen(path) + 1);
        if (address.sun_path[0] == '@') address.sun_path[0] = '\0';  // the abstract name space
        fd_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + std::strlen(path));
        connected_ = connect(fd_, reinterpret_cast<const sockaddr*>(&address), length) == 0;
    }
    ServiceManager(const ServiceManager&) = delete;
    ServiceManager& operator=(const ServiceManager&) = delete;
    ~ServiceManager() {
        if (fd_ >= 0) close(fd_);
    }

    void tell(const std::string& state) const {
        if (connected_) send(fd_, state.data(), state.size(), MSG_NOSIGNAL);
    }

private:
    int fd_ = -1;
    bool connected_ = false;
};

/// A file with the number of this process, removed with it.
class PidFile {
public:
    PidFile() = default;
    PidFile(const PidFile&) = delete;
    PidFile& operator=(const PidFile&) = delete;
    ~PidFile() {
        if (!path_.empty()) unlink(path_.c_str());
    }

    qcow::Result<void> write(const std::string& path) {
        auto* file = std::fopen(path.c_str(), "w");
        if (file == nullptr) return system_failure(path, "cannot write");
        path_ = path;
        fmt::print(file, "{}\n", getpid());
        if (std::fclose(file) != 0) return system_failure(path, "cannot write");
        return {};
    }

private:
    std::string path_;
};

qcow::NbdServer* serving = nullptr;

/// SIGTERM and SIGINT end the service while this lives.
class StopOnSignals {
public:
    explicit StopOnSignals(qcow::NbdServer& server) {
        serving = &server;
        set([](int) { serving->stop(); });
    }
    StopOnSignals(const StopOnSignals&) = delete;
    StopOnSignals& operator=(const StopOnSignals&) = delete;
    ~StopOnSignals() { set(SIG_DFL); }

private:
    static void set(void (*handler)(int)) {
        struct sigaction action = {};
        action.sa_handler = handler;
        for (const int signal : {SIGTERM, SIGINT}) sigaction(signal, &action, nullptr);
    }
};

bool only_reads(const Options& options) { return options.read_only || !options.source.snapshot.empty(); }

/// How the image of this name is opened.
qcow::Result<qcow::ImageSpec> served_spec(const Options& options, const std::string& name) {
    auto source = options.source;
    QCOW_TRY_VOID(name_source(source, name));
    auto spec = QCOW_TRY(spec_of(source));
    if (!only_reads(options)) {
        set_cache(spec, options.cache);
        spec.write->discard = options.discard == "unmap";
    }
    return spec;
}

std::string export_name(const Options& options, std::size_t index) {
    if (index < options.names.size()) return options.names[index];
    return options.images.size() == 1 ? "" : std::filesystem::path(options.images[index]).filename().string();
}

/// Offers a bitmap with every export whose image has it. `exports` are of these images, in this order.
qcow::Result<void> offer_bitmap(const std::string& name, const std::vector<std::shared_ptr<qcow::Image>>& images,
                                std::vector<qcow::NbdExport>& exports) {
    qcow::Result<void> result;
    bool offered = false;
    for (std::size_t i = 0; i < images.size(); ++i) {
        auto context = qcow::dirty_bitmap_context(images[i], name);
        if (!context && context.error().code != qcow::Errc::not_found)
            return std::unexpected(std::move(context).error());
        if (context) {
            exports[i].contexts.push_back(*std::move(context));
            offered = true;
        } else {
            result = std::unexpected(std::move(context).error());
        }
    }
    return offered ? qcow::Result<void>() : result;
}

bool with_tls(const Options& options) {
    return !options.tls.certificates.empty() || !options.tls.psk_file.empty() || options.tls.verify_peer;
}

/// Secrets that are not quite secret.
void warn_of_open_secrets(const qcow::NbdTls& tls) {
    const auto path = tls.psk_file.empty() ? tls.certificates + "/server-key.pem" : tls.psk_file;
    if (struct stat status = {}; stat(path.c_str(), &status) == 0 && (status.st_mode & S_IROTH) != 0)
        complain(fmt::format("WARNING: {} can be read by every user of this machine; chmod it to 0600",
                             qcow::printable(path)));
}

qcow::Result<void> listen(qcow::NbdServer& server, const Options& options) {
    const int inherited = inherited_sockets();
    for (int i = 0; i < inherited; ++i)
        if (auto done = server.listen_inherited(3 + i); !done) return done;
    if (!options.socket.empty())
        if (auto done = server.listen_unix(options.socket); !done) return done;
    const bool tcp = !options.bind.empty() || options.port_given || (inherited == 0 && options.socket.empty());
    if (!tcp) return {};
    const auto host = options.bind.empty() ? "localhost" : options.bind;
    const auto port = server.listen_tcp(host, options.port);
    if (!port) return std::unexpected(port.error());
    fmt::print("listening on {} port {}\n", host, *port);
    std::fflush(stdout);
    const bool within_machine = host == "localhost" || host.starts_with("127.") || host == "::1";
    const bool knows_clients = options.tls.verify_peer || !options.tls.psk_file.empty();
    if (!within_machine && !knows_clients) {
        complain(
            fmt::format("WARNING: whoever can reach {} port {} can read{} the disk{}; "
                        "use --tls-certificates with --tls-verify-peer, or --tls-psk",
                        host, *port, options.read_only ? "" : " and change",
                        with_tls(options) ? "" : ", and all data crosses the network unencrypted"));
    }
    return {};
}

/// Everything is open: what else this process could do, it need not be able to.
qcow::Result<void> confine(const Options& options) {
    auto sandbox = options.sandbox;
    if (!options.socket.empty()) sandbox.given = {options.socket};
    for (const auto& path : {options.socket, options.pid_file})
        if (!path.empty()) sandbox.removed.push_back(path);
    auto state = enter_sandbox(sandbox);
    if (!state) return std::unexpected(std::move(state).error());
    complain("sandbox: " + *state);
    return {};
}

qcow::Result<int> run(const Options& options) {
    if (options.names.size() > options.images.size() || options.descriptions.size() > options.images.size()) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "",
                                           "more of --export-name or --description than there are images"});
    }
    if (options.source.force_share && !only_reads(options)) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "option --force-share",
                                           "two that write to an image destroy it; add --read-only or --snapshot"});
    }
    qcow::FilesInUse in_use;
    for (const auto& path : {options.socket, options.pid_file}) {
        auto verified = path.empty() ? qcow::Result<void>() : verify_names_a_file(path);
        if (!verified) return std::unexpected(std::move(verified).error());
    }
    if (!options.pid_file.empty()) {
        auto added = in_use.add(qcow::FilesInUse::Use::written, options.pid_file, "the file for the process number");
        if (!added) return std::unexpected(std::move(added).error());
    }
    std::vector<std::shared_ptr<qcow::Image>> images;
    std::vector<qcow::NbdExport> exports;
    for (std::size_t i = 0; i < options.images.size(); ++i) {
        const auto spec = QCOW_TRY(served_spec(options, options.images[i]));
        auto image = open(spec);
        if (!image) return std::unexpected(std::move(image).error());
        QCOW_TRY_VOID(in_use.add(qcow::FilesInUse::Use::read, **image, spec, "the image"));
        auto disk = disk_of(*image, options.source);
        if (!disk) return std::unexpected(std::move(disk).error());
        // Not by every request of a client: an encrypted image cannot be read at all.
        if (auto readable = (*disk)->read({0}, {}); !readable) return std::unexpected(std::move(readable).error());
        images.push_back(*image);
        exports.push_back({export_name(options, i),
                           i < options.descriptions.size() ? options.descriptions[i] : std::string(), *disk,
                           only_reads(options), options.allocation_depth});
    }
    for (const auto& bitmap : options.bitmaps)
        if (auto done = offer_bitmap(bitmap, images, exports); !done) return std::unexpected(std::move(done).error());
    qcow::NbdOptions server_options = {.limits = {.connections = options.connections},
                                       .persistent = options.persistent};
    if (with_tls(options)) server_options.tls = options.tls;
    auto server = qcow::NbdServer::make(std::move(exports), server_options);
    if (!server) return std::unexpected(std::move(server).error());
    if (with_tls(options)) warn_of_open_secrets(options.tls);
    const StopOnSignals signals(**server);
    if (auto done = listen(**server, options); !done) return std::unexpected(std::move(done).error());

    PidFile pid_file;
    if (!options.pid_file.empty())
        if (auto done = pid_file.write(options.pid_file); !done) return std::unexpected(std::move(done).error());
    const ServiceManager manager;
    if (auto done = confine(options); !done) return std::unexpected(std::move(done).error());
    manager.tell("READY=1");
    auto result = (*server)->run();
    manager.tell("STOPPING=1");
    for (const auto& image : images) {
        auto closed = image->close();
        if (result) result = std::move(closed);
    }
    if (!result) return std::unexpected(std::move(result).error());
    return ok;
}

}  // namespace

void declare_serve(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "serve", "Serve images over NBD: to virtual machines, backup tools, nbdcopy, ...",
        "Without --socket and --bind, and unless a service manager (or nbdcopy) hands over a socket, the server\n"
        "listens on TCP port 10809 of localhost. It ends when its last client leaves, or with --persistent when it\n"
        "gets SIGTERM or SIGINT; requests that have arrived are then completed, and everything is flushed.\n"
        "\n"
        "Several images are several exports. A client that names none gets the first. One image alone has the empty\n"
        "name; several have those of their files, unless --export-name is given, once for each.\n"
        "Anybody who can connect can use the disk: put a Unix socket into a directory that only the right people can\n"
        "enter, and serve to a network only over TLS.\n"
        "With TLS, clients that do not use it are turned away. Certificates alone prove the server to its clients:\n"
        "anybody can be one. --tls-verify-peer lets in only those with a certificate of the same CA, --tls-psk only\n"
        "those with a key. The files are QEMU's and nbdkit's: certtool and psktool make them.\n"
        "Before it takes clients, the server gives up what it no longer needs: opening files, making connections,\n"
        "running programs (Landlock and seccomp, as far as the system has them; it says so when it starts). With\n"
        "--user, root becomes somebody else: the Unix socket is then that user's, and it and the process number are\n"
        "removed at the end only if the user may write to their directories.\n"
        "Examples:\n"
        "  qcow serve --socket /run/vm/disk.sock --persistent disk.qcow2\n"
        "  qemu-system-x86_64 -drive file=nbd+unix:///?socket=/run/vm/disk.sock,format=raw ...\n"
        "  qcow serve --bind 0.0.0.0 --tls-certificates /etc/pki/qcow --tls-verify-peer --persistent disk.qcow2\n"
        "  nbdcopy -- [ qcow serve --read-only disk.qcow2 ] disk.raw\n"
        "  nbdinfo --map -- [ qcow serve --read-only --snapshot monday disk.qcow2 ]",
        [options] { return run(*options); });
    app.add_option("IMAGE", options->images, "The images: files or block devices")->required()->check(name_text);
    add_open_options(app, options->source);
    auto* snapshot = add_snapshot_option(app, options->source, "Serve this internal snapshot (id or name), read-only");
    app.add_flag("-r,--read-only", options->read_only,
                 "Let nobody write; other processes may read the image, too. --force-share takes this or --snapshot");
    app.add_option("-k,--socket", options->socket, "Listen on a Unix socket at this path")
        ->type_name("PATH")
        ->check(name_text);
    app.add_option("-b,--bind", options->bind, "Listen on TCP, on the addresses of this host (default: localhost)")
        ->type_name("HOST")
        ->check(name_text);
    app.add_option("-p,--port", options->port, "The TCP port; 0: a free one, which is printed")
        ->type_name("NUMBER")
        ->check(whole_number(0, 65535))
        ->capture_default_str()
        ->each([options](const std::string&) { options->port_given = true; });
    app.add_option("-x,--export-name", options->names, "The name of the export; once for each image")
        ->type_name("NAME")
        ->allow_extra_args(false);
    app.add_option("-D,--description", options->descriptions, "What clients are told about it; once for each image")
        ->allow_extra_args(false);
    app.add_option("-e,--connections", options->connections, "Clients at a time; others wait")
        ->type_name("NUMBER")
        ->check(whole_number(1, 10000))
        ->capture_default_str();
    app.add_flag("-t,--persistent", options->persistent, "Stay when the last client has left");
    app.add_option("--tls-certificates", options->tls.certificates,
                   "Serve over TLS only, with the server-cert.pem and server-key.pem of this directory")
        ->type_name("DIRECTORY")
        ->check(name_text);
    app.add_flag("--tls-verify-peer", options->tls.verify_peer,
                 "Let in only clients with a certificate of that directory's ca-cert.pem");
    app.add_option("--tls-psk", options->tls.psk_file, "Serve over TLS only, to clients with a NAME:KEY of this file")
        ->type_name("FILE")
        ->check(name_text);
    app.add_option("--pid-file", options->pid_file, "Write the process number to this file once clients can connect")
        ->type_name("FILE")
        ->check(name_text);
    one_of(app.add_option("--sandbox", options->sandbox.mode,
                          "What is given up. auto: as much as this system can; on: all, or it does not start; off: "
                          "nothing"),
           {"auto", "on", "off"})
        ->capture_default_str();
    app.add_option("--user", options->sandbox.user, "Become this user once everything is open; only root can")
        ->type_name("NAME")
        ->check(name_text);
    add_cache_option(app, options->cache)
        ->description(
            "When writes reach the disk. writeback: with a client's flush; writethrough: each one at once; none: with "
            "a "
            "flush, and past the system's cache; unsafe: when the system likes");
    one_of(app.add_option("--discard", options->discard, "What clients' trim requests do: give space back, or nothing"),
           {"unmap", "ignore"})
        ->capture_default_str();
    app.add_flag("-A,--allocation-depth", options->allocation_depth,
                 "Offer the context qemu:allocation-depth: which image of the chain decides");
    app.add_option("-B,--bitmap", options->bitmaps,
                   "Offer the context qemu:dirty-bitmap:NAME: what has changed; may be given several times")
        ->type_name("NAME")
        ->check(name_text)
        ->allow_extra_args(false)
        ->excludes(snapshot);
}

}  // namespace tool
