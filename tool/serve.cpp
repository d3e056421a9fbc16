// qcow serve: serves images over NBD.

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
    Source source;  // the options of all images
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

/// Returns the number of sockets that a service manager passes, from file descriptor 3 on.
int inherited_sockets() {
    const auto number = [](const char* name) {
        const char* text = std::getenv(name);
        return text == nullptr ? 0 : std::atoi(text);
    };
    return number("LISTEN_PID") == getpid() ? std::max(0, number("LISTEN_FDS")) : 0;
}

/// The service manager, if there is one that wants to be notified.
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

/// A file with the ID of this process. The destructor removes it.
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

/// While this lives, SIGTERM and SIGINT stop the server.
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

/// Returns how to open the image with this name.
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

/// Offers a bitmap with each export whose image has it. `exports[i]` belongs to `images[i]`.
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

/// Warns if other users can read the private key.
void warn_of_open_secrets(const qcow::NbdTls& tls) {
    const auto path = tls.psk_file.empty() ? tls.certificates + "/server-key.pem" : tls.psk_file;
    if (struct stat status = {}; stat(path.c_str(), &status) == 0 && (status.st_mode & S_IROTH) != 0) {
        complain(fmt::format("WARNING: {} can be read by every user of this machine; use chmod 0600",
                             qcow::printable(path)));
    }
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
            fmt::format("WARNING: any client that can reach {} port {} can read{} the disk{}; "
                        "use --tls-certificates with --tls-verify-peer, or --tls-psk",
                        host, *port, options.read_only ? "" : " and change",
                        with_tls(options) ? "" : ", and all data crosses the network unencrypted"));
    }
    return {};
}

/// Confines the process, when everything is open.
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
                                           "--export-name or --description is given more often than there are images"});
    }
    if (options.source.force_share && !only_reads(options)) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "option --force-share",
                                           "two writers destroy an image; add --read-only or --snapshot"});
    }
    qcow::FilesInUse in_use;
    for (const auto& path : {options.socket, options.pid_file}) {
        auto verified = path.empty() ? qcow::Result<void>() : verify_names_a_file(path);
        if (!verified) return std::unexpected(std::move(verified).error());
    }
    if (!options.pid_file.empty()) {
        auto added = in_use.add(qcow::FilesInUse::Use::written, options.pid_file, "the PID file");
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
        // Here, and not with each request of a client: an encrypted image cannot be read at all.
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
        "The server listens on TCP port 10809 of localhost. --socket, --bind, or a socket from a service manager or\n"
        "nbdcopy replaces this address. The server ends when its last client leaves, or at SIGTERM or SIGINT. It then\n"
        "completes the requests that have arrived, and flushes everything.\n"
        "\n"
        "Each image is an export. A client that names no export gets the first one. The name of a single export is\n"
        "empty. Several exports are named after their files, unless --export-name is given for each image.\n"
        "\n"
        "Any client that can connect can use the disk. Put a Unix socket into a directory that only trusted users can\n"
        "enter, and use TLS on a network. The server then refuses clients without TLS. Certificates alone identify\n"
        "only the server: any client is accepted. --tls-verify-peer accepts only clients with a certificate of the\n"
        "same CA, --tls-psk only clients with a key. QEMU and nbdkit use the same files, and certtool and psktool\n"
        "make them.\n"
        "\n"
        "Before it accepts clients, the server gives up the right to open files, make connections and run programs,\n"
        "as far as the system has Landlock and seccomp. It prints what is in force. With --user, root switches to\n"
        "another user, who then owns the Unix socket. The socket and the PID file are removed at the end only if this\n"
        "user may write to their directories.\n"
        "\n"
        "Examples:\n"
        "  qcow serve --socket /run/vm/disk.sock --persistent disk.qcow2\n"
        "  qemu-system-x86_64 -drive file=nbd+unix:///?socket=/run/vm/disk.sock,format=raw ...\n"
        "  qcow serve --bind 0.0.0.0 --tls-certificates /etc/pki/qcow --tls-verify-peer --persistent disk.qcow2\n"
        "  nbdcopy -- [ qcow serve --read-only disk.qcow2 ] disk.raw\n"
        "  nbdinfo --map -- [ qcow serve --read-only --snapshot monday disk.qcow2 ]",
        [options] { return run(*options); });
    app.add_option("IMAGE", options->images, "Image files or block devices")->required()->check(name_text);
    add_open_options(app, options->source);
    auto* snapshot = add_snapshot_option(app, options->source, "Serve this internal snapshot (id or name), read-only");
    app.add_flag("-r,--read-only", options->read_only,
                 "Refuse writes. Other processes can read the image, too. --force-share needs this or --snapshot");
    app.add_option("-k,--socket", options->socket, "Listen on a Unix socket at this path")
        ->type_name("PATH")
        ->check(name_text);
    app.add_option("-b,--bind", options->bind, "Listen on TCP, on all addresses of this host (default: localhost)")
        ->type_name("HOST")
        ->check(name_text);
    app.add_option("-p,--port", options->port, "TCP port; 0: any free port, which is printed")
        ->type_name("NUMBER")
        ->check(whole_number(0, 65535))
        ->capture_default_str()
        ->each([options](const std::string&) { options->port_given = true; });
    app.add_option("-x,--export-name", options->names, "Name of an export; once for each image, in their order")
        ->type_name("NAME")
        ->allow_extra_args(false);
    app.add_option("-D,--description", options->descriptions,
                   "Description of an export, for clients; once for each image, in their order")
        ->allow_extra_args(false);
    app.add_option("-e,--connections", options->connections, "Largest number of clients at a time; others wait")
        ->type_name("NUMBER")
        ->check(whole_number(1, 10000))
        ->capture_default_str();
    app.add_flag("-t,--persistent", options->persistent, "Keep running when the last client leaves");
    app.add_option("--tls-certificates", options->tls.certificates,
                   "Require TLS, with server-cert.pem and server-key.pem of this directory")
        ->type_name("DIRECTORY")
        ->check(name_text);
    app.add_flag("--tls-verify-peer", options->tls.verify_peer,
                 "Accept only clients with a certificate that ca-cert.pem of that directory has signed");
    app.add_option("--tls-psk", options->tls.psk_file,
                   "Require TLS, and accept only clients with a key of this file (lines NAME:KEY)")
        ->type_name("FILE")
        ->check(name_text);
    app.add_option("--pid-file", options->pid_file, "Write the process ID to this file when clients can connect")
        ->type_name("FILE")
        ->check(name_text);
    one_of(
        app.add_option("--sandbox", options->sandbox.mode,
                       "How to confine the server. auto: as far as this system can; on: completely, or fail; off: not "
                       "at all"),
        {"auto", "on", "off"})
        ->capture_default_str();
    app.add_option("--user", options->sandbox.user, "Switch to this user when everything is open; only root can")
        ->type_name("NAME")
        ->check(name_text);
    add_cache_option(app, options->cache)
        ->description(
            "When writes become durable. writeback: at a client's flush; writethrough: each one at once; none: at a "
            "flush, without the page cache (direct I/O); unsafe: not before the system writes them");
    one_of(app.add_option("--discard", options->discard,
                          "What trim requests of clients do: unmap releases storage, ignore does nothing"),
           {"unmap", "ignore"})
        ->capture_default_str();
    app.add_flag("-A,--allocation-depth", options->allocation_depth,
                 "Offer the context qemu:allocation-depth, which tells the layer of each extent");
    app.add_option("-B,--bitmap", options->bitmaps,
                   "Offer the context qemu:dirty-bitmap:NAME, which tells what has changed. May be repeated")
        ->type_name("NAME")
        ->check(name_text)
        ->allow_extra_args(false)
        ->excludes(snapshot);
}

}  // namespace tool
