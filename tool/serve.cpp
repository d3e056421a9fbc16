// qcow serve: serves images over NBD and vhost-user.

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <thread>

#include "command.h"
#include "qcow/control.h"
#include "qcow/serve.h"
#include "qcow/text.h"
#include "qcow/vhost_user.h"
#include "sandbox.h"
#include "service.h"

namespace tool {
namespace {

struct ServeOptions {
    std::vector<std::string> images;
    Source source;  // the options of all images
    std::vector<std::string> names;
    std::vector<std::string> descriptions;
    std::vector<std::string> bitmaps;
    std::string socket;
    std::string bind;
    std::uint16_t port = 10809;
    std::string control;
    std::string pid_file;
    std::string cache = "writeback";
    std::string discard = "unmap";
    std::vector<std::string> guests;  // vhost-user sockets, one an image
    std::vector<std::string> serials;
    qcow::VhostUserOptions guest;
    qcow::NbdTls tls;
    unsigned connections = qcow::NbdLimits().connections;
    Sandbox sandbox;
    bool port_given = false;
    bool read_only = false;
    bool persistent = false;
    bool allocation_depth = false;
};

/// Returns the number of sockets that a service manager passes, from file descriptor 3 on.
int inherited_sockets() {
    const auto number = [](const char* name) {
        const char* text = std::getenv(name);
        return text == nullptr ? 0 : std::atoi(text);
    };
    return number("LISTEN_PID") == getpid() ? std::max(0, number("LISTEN_FDS")) : 0;
}

/// The servers of this process: at most one for NBD, and one for each virtual machine.
class Servers {
public:
    void set_nbd(std::unique_ptr<qcow::NbdServer> server) { nbd_ = std::move(server); }
    /// `may_return`: the server takes the place of one that may have been killed, so that its front end comes back.
    void add_guest(std::unique_ptr<qcow::VhostUserServer> server, bool may_return) {
        if (may_return) returning_.push_back(server.get());
        guests_.push_back(std::move(server));
    }

    /// Runs them until stop() is called, or until the last client has left. If there are virtual machines, NBD clients
    /// do not count. Returns the first error.
    qcow::Result<void> run() {
        complete_ = true;
        if (stopping_) stop();
        std::vector<qcow::Result<void>> results(guests_.size());
        std::atomic<std::size_t> left = guests_.size();
        std::vector<std::thread> threads;
        threads.reserve(guests_.size());
        for (std::size_t i = 0; i < guests_.size(); ++i) {
            threads.emplace_back([&, i] {
                results[i] = guests_[i]->run();
                if (--left == 0 && nbd_) nbd_->stop();
            });
        }
        qcow::Result<void> result;
        if (nbd_) {
            wait_for_guests();
            result = nbd_->run();
        }
        if (!result) stop();
        for (auto& thread : threads) thread.join();
        for (auto& guest : results)
            if (result) result = std::move(guest);
        return result;
    }

    /// Waits until those front ends are back that may come back, for some seconds, or until stop() is called. Their
    /// machines have written what the images do not have yet, and nobody else may change these before they do.
    void wait_for_guests() const {
        const auto end = std::chrono::steady_clock::now() + patience;
        const auto is_back = [](const auto* guest) { return guest->has_served(); };
        while (!stopping_ && std::chrono::steady_clock::now() < end && !std::ranges::all_of(returning_, is_back))
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }

    /// Makes run() return, also a later call of it. Async-signal-safe.
    void stop() noexcept {
        stopping_ = true;
        if (!complete_) return;
        if (nbd_) nbd_->stop();
        for (const auto& guest : guests_) guest->stop();
    }

    void announce_sizes() const noexcept {
        for (const auto& guest : guests_) guest->announce_size();
    }

private:
    std::unique_ptr<qcow::NbdServer> nbd_;
    std::vector<std::unique_ptr<qcow::VhostUserServer>> guests_;
    static constexpr std::chrono::seconds patience{5};  // QEMU tries every second, or as often as it is told

    std::vector<const qcow::VhostUserServer*> returning_;
    std::atomic<bool> complete_ = false;  // whether the list of servers does not change any more
    std::atomic<bool> stopping_ = false;
};

bool only_reads(const ServeOptions& options) { return options.read_only || !options.source.snapshot.empty(); }

/// Returns how to open the image with this name.
qcow::Result<qcow::ImageSpec> served_spec(const ServeOptions& options, const std::string& name) {
    auto source = options.source;
    QCOW_TRY_VOID(name_source(source, name));
    auto spec = QCOW_TRY(spec_of(source));
    if (!only_reads(options)) {
        set_cache(spec, options.cache);
        spec.write->discard = options.discard == "unmap";
    }
    return spec;
}

std::string export_name(const ServeOptions& options, std::size_t index) {
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

bool with_tls(const ServeOptions& options) {
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

/// The number of a socket that is given as "fd:NUMBER".
std::optional<int> descriptor_of(const std::string& socket) {
    constexpr std::string_view prefix = "fd:";
    int number = 0;
    const auto* const end = socket.data() + socket.size();
    if (!socket.starts_with(prefix)) return std::nullopt;
    const auto [last, error] = std::from_chars(socket.data() + prefix.size(), end, number);
    return error == std::errc() && last == end ? std::optional(number) : std::nullopt;
}

/// The sockets that a service manager passes and no virtual machine has, by their descriptors.
std::vector<int> sockets_for_nbd(const ServeOptions& options) {
    std::vector<int> sockets;
    for (int fd = 3; fd < 3 + inherited_sockets(); ++fd) {
        const auto is_it = [&](const std::string& guest) { return descriptor_of(guest) == fd; };
        if (std::ranges::none_of(options.guests, is_it)) sockets.push_back(fd);
    }
    return sockets;
}

/// Whether NBD clients are served, too.
bool with_nbd(const ServeOptions& options) {
    return options.guests.empty() || !options.socket.empty() || !options.bind.empty() || options.port_given ||
           !sockets_for_nbd(options).empty();
}

qcow::Result<void> listen(qcow::NbdServer& server, const ServeOptions& options) {
    const auto inherited = sockets_for_nbd(options);
    for (const int fd : inherited)
        if (auto done = server.listen_inherited(fd); !done) return done;
    if (!options.socket.empty())
        if (auto done = server.listen_unix(options.socket); !done) return done;
    const bool tcp = !options.bind.empty() || options.port_given || (inherited.empty() && options.socket.empty());
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

/// The images under the names of their exports. The empty name of a single export is that of its file.
std::vector<qcow::ControlledImage> controlled(const ServeOptions& options,
                                              const std::vector<std::shared_ptr<qcow::Image>>& images) {
    std::vector<qcow::ControlledImage> result;
    for (std::size_t i = 0; i < images.size(); ++i) {
        auto name = export_name(options, i);
        if (name.empty()) name = std::filesystem::path(options.images[i]).filename().string();
        result.push_back({std::move(name), images[i], only_reads(options)});
    }
    return result;
}

/// Serves commands in a thread of its own, until the end of its life.
class ControlThread {
public:
    ControlThread(qcow::ControlServer* server, const Servers& servers) : server_(server) {
        if (server == nullptr) return;
        thread_ = std::thread([this, &servers] {
            servers.wait_for_guests();
            result_ = server_->run();
        });
    }
    ControlThread(const ControlThread&) = delete;
    ControlThread& operator=(const ControlThread&) = delete;
    ~ControlThread() { static_cast<void>(end()); }

    qcow::Result<void> end() {
        if (!thread_.joinable()) return {};
        server_->stop();
        thread_.join();
        return result_;
    }

private:
    qcow::ControlServer* server_;
    qcow::Result<void> result_;
    std::thread thread_;
};

/// Adds a server for the virtual machine of an image, which listens.
qcow::Result<void> add_guest(Servers& servers, const ServeOptions& options, std::size_t index,
                             std::shared_ptr<qcow::Disk> disk) {
    auto guest = options.guest;
    guest.read_only = only_reads(options);
    guest.persistent = options.persistent;
    if (index < options.serials.size()) guest.serial = options.serials[index];
    const auto& socket = options.guests[index];
    guest.complain = [socket](const std::string& text) {
        complain(fmt::format("{}: {}", qcow::printable(socket), text));
    };
    const auto& image = options.images[index];
    if (const auto rest = disk->size() % guest.block_size; rest != 0) {
        complain(fmt::format("WARNING: {}: the virtual machine does not see the last {} bytes, because a block has {}",
                             qcow::printable(image), rest, guest.block_size));
    }
    auto made = qcow::VhostUserServer::make(std::move(disk), guest);
    if (!made) return std::unexpected(std::move(made).error().in(image));
    auto server = *std::move(made);
    const auto fd = descriptor_of(socket);
    // A killed server leaves its socket. One that is inherited tells nothing.
    const bool may_return = fd || std::filesystem::exists(socket);
    QCOW_TRY_VOID(fd ? server->listen_inherited(*fd) : server->listen_unix(socket));
    servers.add_guest(std::move(server), may_return);
    return {};
}

/// The files that the server makes, and removes at its end.
std::vector<std::string> made_sockets(const ServeOptions& options) {
    std::vector<std::string> sockets;
    for (const auto& path : {options.socket, options.control})
        if (!path.empty()) sockets.push_back(path);
    for (const auto& guest : options.guests)
        if (!descriptor_of(guest)) sockets.push_back(guest);
    return sockets;
}

/// Confines the process, when everything is open.
qcow::Result<void> confine(const ServeOptions& options) {
    auto sandbox = options.sandbox;
    sandbox.given = made_sockets(options);
    sandbox.removed = made_sockets(options);
    if (!options.pid_file.empty()) sandbox.removed.push_back(options.pid_file);
    sandbox.shares_memory = !options.guests.empty();
    auto state = enter_sandbox(sandbox);
    if (!state) return std::unexpected(std::move(state).error());
    complain("sandbox: " + *state);
    return {};
}

/// Refuses options that do not go together.
qcow::Result<void> verify(const ServeOptions& options) {
    const auto refuse = [](std::string option, std::string why) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, std::move(option), std::move(why)});
    };
    if (options.names.size() > options.images.size() || options.descriptions.size() > options.images.size())
        return refuse("", "--export-name or --description is given more often than there are images");
    if (options.source.force_share && !only_reads(options))
        return refuse("option --force-share", "two writers destroy an image; add --read-only or --snapshot");
    if (!options.guests.empty() && options.guests.size() != options.images.size())
        return refuse("option --vhost-user", "each image needs a socket of its own; repeat the option");
    for (const auto& socket : options.guests) {
        if (socket.starts_with("fd:") && !descriptor_of(socket)) {
            return refuse("option --vhost-user",
                          fmt::format("{} has no number of a file descriptor; write ./{} for a path",
                                      qcow::printable(socket), qcow::printable(socket)));
        }
    }
    if (options.serials.size() > options.guests.size())
        return refuse("option --serial", "it is given more often than there are images");
    if (!with_nbd(options)) {
        for (const auto& [option, given] :
             {std::pair{"--export-name", !options.names.empty() && options.control.empty()},
              {"--description", !options.descriptions.empty()},
              {"--connections", options.connections != qcow::NbdLimits().connections},
              {"--bitmap", !options.bitmaps.empty()},
              {"--allocation-depth", options.allocation_depth}}) {
            if (given)
                return refuse(option, "it is for NBD clients; say where they connect: --socket, --bind or --port");
        }
    }
    for (const auto& path : made_sockets(options)) QCOW_TRY_VOID(verify_names_a_file(path));
    if (!options.pid_file.empty()) QCOW_TRY_VOID(verify_names_a_file(options.pid_file));
    return {};
}

/// The images, and what is served of them.
struct Served {
    std::vector<std::shared_ptr<qcow::Image>> images;
    std::vector<qcow::NbdExport> exports;
};

qcow::Result<Served> open_images(const ServeOptions& options) {
    qcow::FilesInUse in_use;
    if (!options.pid_file.empty())
        QCOW_TRY_VOID(in_use.add(qcow::FilesInUse::Use::written, options.pid_file, "the PID file"));
    Served served;
    for (std::size_t i = 0; i < options.images.size(); ++i) {
        const auto spec = QCOW_TRY(served_spec(options, options.images[i]));
        auto image = QCOW_TRY(open(spec));
        QCOW_TRY_VOID(in_use.add(qcow::FilesInUse::Use::read, *image, spec, "the image"));
        auto disk = QCOW_TRY(disk_of(image, options.source));
        // Here, and not with each request of a client: an encrypted image cannot be read at all.
        QCOW_TRY_VOID(disk->read({0}, {}));
        served.images.push_back(std::move(image));
        served.exports.push_back({export_name(options, i),
                                  i < options.descriptions.size() ? options.descriptions[i] : std::string(),
                                  std::move(disk), only_reads(options), options.allocation_depth});
    }
    for (const auto& bitmap : options.bitmaps) QCOW_TRY_VOID(offer_bitmap(bitmap, served.images, served.exports));
    return served;
}

/// Makes the servers, which then listen.
qcow::Result<void> add_servers(Servers& servers, const ServeOptions& options, std::vector<qcow::NbdExport> exports) {
    for (std::size_t i = 0; i < options.guests.size(); ++i)
        QCOW_TRY_VOID(add_guest(servers, options, i, exports[i].disk));
    if (!with_nbd(options)) return {};
    qcow::NbdOptions nbd = {.limits = {.connections = options.connections},
                            .persistent = options.persistent || !options.guests.empty()};
    if (with_tls(options)) nbd.tls = options.tls;
    auto server = QCOW_TRY(qcow::NbdServer::make(std::move(exports), nbd));
    if (with_tls(options)) warn_of_open_secrets(options.tls);
    QCOW_TRY_VOID(listen(*server, options));
    servers.set_nbd(std::move(server));
    return {};
}

qcow::Result<int> run(const ServeOptions& options) {
    QCOW_TRY_VOID(verify(options));
    auto [images, exports] = QCOW_TRY(open_images(options));
    Servers servers;
    const StopServiceOnSignals signals([&] { servers.stop(); });
    QCOW_TRY_VOID(add_servers(servers, options, std::move(exports)));
    qcow::Control control(controlled(options, images), [&] { servers.stop(); }, [&] { servers.announce_sizes(); });
    std::unique_ptr<qcow::ControlServer> control_server;
    if (!options.control.empty()) control_server = QCOW_TRY(qcow::ControlServer::listen_unix(options.control, control));
    PidFile pid_file;
    if (!options.pid_file.empty()) QCOW_TRY_VOID(pid_file.write(options.pid_file));
    const ServiceManager manager;
    QCOW_TRY_VOID(confine(options));
    manager.tell("READY=1");
    ControlThread control_thread(control_server.get(), servers);
    auto result = servers.run();
    auto controlled_well = control_thread.end();
    if (result) result = std::move(controlled_well);
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
    const auto options = std::make_shared<ServeOptions>();
    auto& app = declare(
        root, status, "serve", "Serve images: over NBD to any client, over vhost-user to virtual machines",
        "The server listens on TCP port 10809 of localhost. --socket, --bind, or a socket from a service manager or\n"
        "nbdcopy replaces this address. The server ends when its last client leaves, or at SIGTERM or SIGINT. It then\n"
        "completes the requests that have arrived, and flushes everything.\n"
        "\n"
        "Each image is an export. A client that names no export gets the first one. The name of a single export is\n"
        "empty. Several exports are named after their files, unless --export-name is given for each image.\n"
        "\n"
        "With --vhost-user, the server is the disk of a virtual machine, by shared memory. Each image needs a socket.\n"
        "NBD clients are then served only if an address for them is given, too. The server ends when the last virtual\n"
        "machine leaves. With --persistent it stays, and a virtual machine that connects again goes on.\n"
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
        "  qcow serve --vhost-user /run/vm/disk.sock --persistent disk.qcow2\n"
        "  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=memory,size=1G,share=on \\\n"
        "      -machine memory-backend=memory -chardev socket,id=disk,path=/run/vm/disk.sock,reconnect=1 \\\n"
        "      -device vhost-user-blk-pci,chardev=disk ...\n"
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
    auto* guests =
        app.add_option(
               "--vhost-user", options->guests,
               "Serve a virtual machine on a Unix socket at this path; once for each image, in their order. fd:N:\n"
               "on the listening socket that was passed as file descriptor N")
            ->type_name("PATH")
            ->check(name_text)
            ->allow_extra_args(false);
    app.add_option("--queues", options->guest.queues,
                   "Queues of a virtual machine's disk (default: one for each processor, but at most 16)")
        ->type_name("NUMBER")
        ->check(whole_number(1, 256))
        ->needs(guests);
    app.add_option("--queue-size", options->guest.queue_size,
                   "Descriptors of a queue in the virtual machine. A request has at most two buffers less")
        ->type_name("NUMBER")
        ->check(whole_number(4, 1024))
        ->capture_default_str()
        ->needs(guests);
    app.add_option("--block-size", options->guest.block_size, "Logical block of a virtual machine's disk in bytes")
        ->check(CLI::IsMember({512U, 4096U}))
        ->type_name("{512,4096}")
        ->capture_default_str()
        ->needs(guests);
    app.add_option("--serial", options->serials,
                   "Serial number of a virtual machine's disk; once for each image, in their order")
        ->type_name("TEXT")
        ->needs(guests)
        ->allow_extra_args(false);
    app.add_option(
           "--poll-us", options->guest.poll_microseconds,
           "Look at an empty queue for up to so many microseconds before sleeping, while requests come as quickly.\n"
           "It costs a processor, and saves system calls")
        ->type_name("NUMBER")
        ->check(whole_number(0, 1000000))
        ->capture_default_str()
        ->needs(guests);
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
    app.add_option(
           "--control", options->control,
           "Listen for commands on a Unix socket at this path, which only the owner of the server can use: see\n"
           "qcow control --help")
        ->type_name("PATH")
        ->check(name_text);
    app.add_option("--pid-file", options->pid_file, "Write the process ID to this file when clients can connect")
        ->type_name("FILE")
        ->check(name_text);
    add_sandbox_options(app, options->sandbox);
    add_cache_option(app, options->cache, "--cache")
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
