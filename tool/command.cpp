#include "command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <span>

#include "create_options.h"
#include "keys.h"
#include "qcow/text.h"
#include "usage.h"

namespace tool {

const CLI::Validator path_of_new_file(
    [](std::string& name) -> std::string {
        const auto parsed = qcow::parse_location(name);
        if (!parsed) return parsed.error().message();
        name = parsed->path;
        return {};
    },
    "");

void complain(const std::string& message) {
    std::fflush(stdout);
    // Not fmt::print: it throws if standard error cannot be written.
    std::fputs(fmt::format("qcow: {}\n", message).c_str(), stderr);
}

void print_json(const Json& json) { fmt::print("{}\n", json.dump(2, ' ', true, Json::error_handler_t::replace)); }

namespace {

struct Command {
    std::string_view name;
    void (*declare)(CLI::App& root, int& status);
    bool may_be_quiet = false;  // has --quiet, as it has in qemu-img
};

/// In the order of the help.
constexpr Command commands[] = {
    {"info", declare_info},
    {"map", declare_map},
    {"check", declare_check, true},
    {"compare", declare_compare},
    {"digest", declare_digest},
    {"create", declare_create},
    {"convert", declare_convert, true},
    {"build", declare_build},
    {"measure", declare_measure},
    {"read", declare_read},
    {"write", declare_write},
    {"zero", declare_zero},
    {"discard", declare_discard},
    {"resize", declare_resize, true},
    {"rebase", declare_rebase, true},
    {"commit", declare_commit, true},
    {"amend", declare_amend, true},
    {"compact", declare_compact, true},
    {"snapshot", declare_snapshot, true},
    {"bitmap", declare_bitmap, true},
    {"serve", declare_serve},
    {"mount", declare_mount},
    {"control", declare_control},
    {"partitions", declare_partitions},
    {"df", declare_df},
    {"ls", declare_ls},
    {"tree", declare_tree},
    {"find", declare_find},
    {"cat", declare_cat},
    {"get", declare_get},
    {"put", declare_put},
    {"rm", declare_rm},
    {"mkdir", declare_mkdir},
};

/// What goes to standard output is discarded from now on.
void silence_output() {
    std::fflush(stdout);
    if (std::freopen("/dev/null", "w", stdout) == nullptr) complain("/dev/null: cannot be opened");
}

}  // namespace

std::unique_ptr<CLI::App> make_app(int& status, std::string_view command) {
    auto made = std::make_unique<CLI::App>(
        "qcow inspects, checks, converts, changes and serves disk images: qcow2 (versions 2 and 3), qcow, luks and "
        "raw.",
        "qcow");
    auto& app = *made;
    app.formatter(std::make_shared<Help>());
    app.set_version_flag("-V,--version", "qcow " QCOW_VERSION)->description("Show the version");
    app.set_help_flag("-h,--help", "Show this help, or with COMMAND the help of the command");
    app.require_subcommand(1);
    app.footer(
        "qcow COMMAND --help explains the command and its options.\n"
        "Sizes and offsets are bytes (4096, 0x1000) or numbers with k, M, G, T, P or E (powers of 1024): 64k, 1.5G.\n"
        "Exit status: 0 success; 1 failure or wrong usage. check, compare and convert have others:\n"
        "see their --help.\n"
        "Examples:\n"
        "  qcow info disk.qcow2                show what the image is\n"
        "  qcow check disk.qcow2               verify its metadata\n"
        "  qcow convert disk.qcow2 disk.raw    copy its contents into a raw file");

    const auto* const wanted = std::ranges::find(commands, command, &Command::name);
    const auto declared = wanted != std::end(commands) ? std::span(wanted, 1) : std::span(commands);
    for (const auto& each : declared) {
        each.declare(app, status);
        if (!each.may_be_quiet) continue;
        auto* quiet = app.get_subcommand(std::string(each.name))->add_flag_callback("-q,--quiet", silence_output);
        quiet->description("Print only warnings and errors");
    }
    for (auto* each : app.get_subcommands({})) {
        each->get_option("--help")->description("Show this help");
        unmark_positionals(*each);
        // The last value of a repeated option counts: scripts append the options of their user to their own.
        for (auto* option : each->get_options())
            if (option->nonpositional() && option->get_items_expected_max() == 1) option->take_last();
    }
    return made;
}

CLI::App& declare(CLI::App& root, int& status, const std::string& name, const std::string& summary,
                  const std::string& help, std::function<qcow::Result<int>()> run) {
    auto& app = *root.add_subcommand(name, summary)->group("Commands");
    app.footer(help);
    app.callback([&status, failure = failure_of(name), run = std::move(run)] {
        const auto result = run();
        if (result) {
            warn_of_unused_keys();
        } else {
            complain(result.error().message());
        }
        status = result.value_or(failure);
    });
    return app;
}

int failure_of(std::string_view command) { return command == "compare" ? 2 : failed; }

void add_format_option(CLI::App& app, std::string& format, const std::string& name, const std::string& description) {
    one_of(app.add_option(name, format, description), {"raw", "qcow", "qcow2", "luks"});
}

void add_force_share_option(CLI::App& app, bool& force_share) {
    app.add_flag("-U,--force-share", force_share,
                 "Read without locks, even if another process is writing; the result may be inconsistent");
}

namespace {

/// The options for ImageName, except its path.
void add_name_options(CLI::App& app, ImageName& name) {
    add_format_option(app, name.format, "-f,--format", "Format of the image (default: guessed from its contents)");
    add_untrusted_option(app, name.untrusted);
    app.add_flag("--image-opts", name.image_opts,
                 "IMAGE is a list of options: driver=FORMAT,file.filename=FILE,encrypt.key-secret=ID, and backing.NAME "
                 "for the backing file");
    add_encryption_options(app, name.max_kdf_seconds);
}

}  // namespace

qcow::Result<void> verify_is_not_stdin(const std::string& path) {
    if (path != "-") return {};
    return std::unexpected(
        qcow::Error{qcow::Errc::invalid_argument, path,
                    "stands for standard input, but an image is not read from front to back; write it "
                    "into a file first (cat > FILE). A file with this name is \"./-\""});
}

qcow::Result<void> name_source(Source& source, const std::string& name) {
    source.location = QCOW_TRY(qcow::parse_location(name));
    source.path = source.location.path;
    return {};
}

CLI::Option* add_source_options(CLI::App& app, Source& source) {
    auto* image = app.add_option("IMAGE", source.path, "Image file or block device")
                      ->required()
                      ->check(name_text)
                      ->transform(CLI::Validator(
                          [&source](std::string& name) -> std::string {
                              if (auto named = name_source(source, name); !named) return named.error().message();
                              name = source.path;
                              return {};
                          },
                          ""));
    add_open_options(app, source);
    return image;
}

void add_open_options(CLI::App& app, Source& source) {
    add_name_options(app, source);
    add_force_share_option(app, source.force_share);
    auto* backing =
        app.add_option("--backing", source.backing, "Use this backing file instead of the one that the image names")
            ->type_name("FILE")
            ->check(name_text);
    add_format_option(app, source.backing_format, "--backing-format",
                      "Format of the backing file (default: recorded in the image, else guessed from its contents)");
    app.add_flag("--no-backing", source.no_backing,
                 "Ignore the backing file: what the image does not store itself reads as zeros")
        ->excludes(backing);
}

void add_encryption_options(CLI::App& app, std::string& max_kdf_seconds) {
    add_key_options(app);
    app.add_option("--max-kdf-seconds", max_kdf_seconds,
                   "Refuse an encrypted image if deriving the keys of its layers takes longer in all (default: 60)")
        ->type_name("NUMBER")
        ->check(whole_number(1, 1'000'000));
}

void set_keys(qcow::ImageSpec& spec, const std::string& max_kdf_seconds, std::vector<LayerKey> keys) {
    spec.keys = key_source(std::move(keys), spec.location.path);
    if (!max_kdf_seconds.empty()) spec.max_kdf_seconds = static_cast<double>(parse_size(max_kdf_seconds));
}

void add_untrusted_option(CLI::App& app, bool& untrusted) {
    app.add_flag(
        "--untrusted", untrusted,
        "Do not trust the image: open the files that it names only if its format is given, and only if they are "
        "regular files in or below its directory");
}

CLI::Option* add_snapshot_option(CLI::App& app, Source& source, const std::string& description,
                                 const std::string& name) {
    return app.add_option(name, source.snapshot, description)->type_name("NAME")->check(name_text);
}

void add_workers_option(CLI::App& app, unsigned& workers) {
    app.add_option("-m,--workers", workers, "Number of threads (default: one per processor)")
        ->type_name("NUMBER")
        ->check(whole_number(1, 1024));
}

namespace {

/// What --image-opts says of an image and the layers below it.
struct ImageOptions {
    std::vector<qcow::Location> layers;
    std::vector<LayerKey> keys;  // by layer
};

qcow::Result<ImageOptions> parse_image_options(const std::string& text) {
    ImageOptions result;
    for (const auto& part : parts_of(text)) {
        const auto refuse = [&](std::string what) {
            return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "--image-opts " + part, std::move(what)});
        };
        const auto equals = std::min(part.find('='), part.size());
        std::string_view name = std::string_view(part).substr(0, equals);
        const auto value = part.substr(std::min(equals + 1, part.size()));
        std::size_t depth = 0;
        for (; name.starts_with("backing."); name.remove_prefix(8)) ++depth;
        if (depth >= 100) return refuse("the chain is too long");
        if (result.layers.size() <= depth) result.layers.resize(depth + 1);
        if (result.keys.size() <= depth) result.keys.resize(depth + 1);
        auto& layer = result.layers[depth];
        if (name == "driver") {
            layer.format = qcow::format_from_name(value);
            if (!layer.format) return refuse(not_one_of(value, {"raw", "qcow", "qcow2", "luks"}));
        } else if (name == "file.filename" || name == "filename") {
            layer.path = value;
        } else if (name == "encrypt.key-secret" || name == "key-secret") {
            result.keys[depth].secret = value;
        } else if (name == "encrypt.format" && (value == "luks" || value == "aes")) {
            result.keys[depth].method = value;
        } else if (name != "file.driver" || value != "file") {  // there is only one kind of file
            return refuse(
                "it is none of driver, file.filename and encrypt.key-secret, each with backing. in front for the "
                "backing file");
        }
    }
    if (result.layers.front().path.empty()) {
        return std::unexpected(
            qcow::Error{qcow::Errc::invalid_argument, "--image-opts " + text, "file.filename=FILE is missing"});
    }
    return result;
}

/// What the command line says of an image and the layers below it.
qcow::Result<ImageOptions> options_of(const ImageName& name) {
    ImageOptions options{.layers = {name.location}, .keys = {}};
    if (name.image_opts) options = QCOW_TRY(parse_image_options(name.path));
    if (!name.format.empty()) options.layers.front().format = qcow::format_from_name(name.format);
    return options;
}

}  // namespace

qcow::Result<qcow::ImageSpec> spec_of(const Source& source) {
    auto [layers, keys] = QCOW_TRY(options_of(source));
    qcow::ImageSpec spec{.location = layers.front()};
    if (layers.size() > 1) {
        if (!layers[1].path.empty()) spec.backing = layers[1];
        spec.backing_format = layers[1].format;
    }
    spec.location.alone |= source.no_backing;
    if (!source.backing.empty()) spec.backing = QCOW_TRY(qcow::parse_location(source.backing));
    if (!source.backing_format.empty()) spec.backing_format = qcow::format_from_name(source.backing_format);
    spec.force_share = source.force_share;
    spec.untrusted = source.untrusted;
    if (!source.examines) set_keys(spec, source.max_kdf_seconds, std::move(keys));
    return spec;
}

qcow::Warn warn_on_stderr(std::string_view format_option) {
    return [=](const qcow::Warning& warning) {
        const auto* const prefix = warning.kind == qcow::Warning::Kind::rounded_size ? "" : "warning: ";
        const auto remedy = warning.format ? fmt::format("; if you mean {1}, use {0} {1}", format_option,
                                                         qcow::format_name(*warning.format))
                                           : "";
        complain(prefix + warning.message + remedy);
    };
}

qcow::Result<std::shared_ptr<qcow::Image>> open(const qcow::ImageSpec& spec) {
    QCOW_TRY_VOID(verify_is_not_stdin(spec.location.path));
    return qcow::open_image(spec, warn_on_stderr());
}

qcow::Result<std::shared_ptr<qcow::Image>> open_source(const Source& source, bool follow) {
    auto spec = QCOW_TRY(spec_of(source));
    spec.follow = follow;
    if (!follow) spec.keys = {};
    return open(spec);
}

qcow::Result<std::shared_ptr<qcow::Disk>> disk_of(const std::shared_ptr<qcow::Image>& image, const Source& source) {
    if (source.snapshot.empty()) return image;
    return image->snapshots().open(source.snapshot);
}

CLI::Option* add_target_options(CLI::App& app, Target& target) {
    auto* image = app.add_option("IMAGE", target.path, "Image file or block device")
                      ->required()
                      ->check(name_text)
                      ->transform(CLI::Validator(
                          [&target](std::string& name) -> std::string {
                              auto parsed = qcow::parse_location(name);
                              if (!parsed) return parsed.error().message();
                              if (parsed->alone) return "an image without its backing file can be only read";
                              name = parsed->path;
                              target.location = *std::move(parsed);
                              return {};
                          },
                          ""));
    add_change_options(app, target);
    return image;
}

void add_change_options(CLI::App& app, Target& target) {
    add_name_options(app, target);
    add_cache_option(app, target.cache);
}

CLI::Option* add_cache_option(CLI::App& app, std::string& cache, const std::string& names) {
    return one_of(app.add_option(
                      names, cache,
                      "When writes become durable. writeback: at the end; writethrough: each one at once; none: "
                      "at the end, without the page cache (direct I/O); unsafe: not before the system writes them"),
                  {"writeback", "writethrough", "none", "unsafe"})
        ->capture_default_str();
}

void add_output_options(CLI::App& app, bool& json, const std::string& description) {
    app.add_flag("--json", json, description);
    one_of(app.add_option_function<std::string>(
               "--output", [&json](const std::string& kind) { json |= kind == "json"; },
               "Print text for people (human), or JSON"),
           {"human", "json"})
        ->default_str("human");
}

qcow::Result<qcow::ImageSpec> spec_of(const Target& target) {
    auto [layers, keys] = QCOW_TRY(options_of(target));
    qcow::ImageSpec spec{.location = layers.front()};
    for (const auto& layer : std::span(layers).subspan(1)) {
        if (layer.path.empty() && !layer.format) continue;
        return std::unexpected(qcow::Error{
            qcow::Errc::invalid_argument, "--image-opts " + target.path,
            "an image that is changed has the backing file that it names; of that, give only encrypt.key-secret"});
    }
    spec.untrusted = target.untrusted;
    set_cache(spec, target.cache);
    set_keys(spec, target.max_kdf_seconds, std::move(keys));
    return spec;
}

void set_cache(qcow::ImageSpec& spec, const std::string& cache) {
    spec.write.emplace();
    if (cache == "writethrough") spec.write->cache = qcow::CacheMode::writethrough;
    if (cache == "unsafe") spec.write->cache = qcow::CacheMode::unsafe;
    spec.direct = cache == "none";
}

qcow::Result<void> verify_names_a_file(const std::string& path) {
    if (path != "-") return {};
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                       "stands for standard input or output, but a file is needed here. A file with "
                                       "this name is \"./-\""});
}

qcow::Result<int> change(const Target& target, const Change& work) {
    const StopOnSignals signals;
    const auto image = QCOW_TRY(open(QCOW_TRY(spec_of(target))));
    QCOW_TRY_VOID(work(*image, signals.token()));
    QCOW_TRY_VOID(image->close());
    return ok;
}

qcow::Result<void> verify_range(const qcow::Disk& disk, const std::string& path, std::uint64_t at,
                                std::uint64_t length) {
    if (at <= disk.size() && length <= disk.size() - at) return {};
    const auto what =
        at > disk.size() ? fmt::format("offset {} lies", at) : fmt::format("{} bytes at {} reach", length, at);
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                       fmt::format("{} past the end of the disk ({} bytes)", what, disk.size())});
}

}  // namespace tool
