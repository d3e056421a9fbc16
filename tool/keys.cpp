#include "keys.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <system_error>

#include "arguments.h"
#include "command.h"
#include "create_options.h"
#include "failure.h"
#include "qcow/text.h"
#include "qcow/try.h"
#include "signals.h"

namespace tool {
namespace {

using qcow::Errc;
using qcow::Result;
using qcow::Secret;

constexpr std::size_t max_key_bytes = 8 << 20;  // as cryptsetup
constexpr std::size_t first_piece = 4096;       // of a key of unknown length
constexpr auto no_key = "the new key is empty, so that anybody could open the image";

/// Where an option says that a key is, and the key, once it was read: a pipe gives it only once.
struct GivenKey {
    std::string file;     // "-" for standard input
    int descriptor = -1;  // if there is no file
    std::optional<Secret> key;
    bool used = false;
    bool is_new = false;  // of the new image
};

/// The values of the options.
struct Arguments {
    std::vector<std::string> objects;  // with numbers in place of secrets
    std::vector<Secret> data;          // the secrets of objects, as they are written
    std::set<std::string> named;       // ids of objects that are the keys of what -o says, and of nothing else
    std::vector<GivenKey> keys;        // of --key and --key-fd, as they come on the command line

    // Keys by the file that they belong to: an image that is opened twice takes no second key.
    std::map<std::string, Secret> known;
    std::size_t taken = 0;
};

Arguments& arguments() {
    static Arguments all;
    return all;
}

class Descriptor {
public:
    explicit Descriptor(int fd) : fd_(fd) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (fd_ > STDERR_FILENO) ::close(fd_);
    }
    [[nodiscard]] int get() const { return fd_; }

private:
    int fd_;
};

std::unexpected<qcow::Error> system_error(const std::string& name) {
    const int code = errno;
    const auto kind = code == ENOENT ? Errc::not_found : code == EACCES ? Errc::access_denied : Errc::io;
    return std::unexpected(qcow::Error{kind, name, std::generic_category().message(code)});
}

/// From now on, a crash leaves no memory image with keys, neither in a file nor in a program that gets it, and other
/// programs of the user cannot look into this one.
void forbid_core_dumps() {
    const rlimit none = {};
    static_cast<void>(setrlimit(RLIMIT_CORE, &none));
    static_cast<void>(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
}

/// Reads up to the end, or to the end of the first line, which is left out.
Result<Secret> read_secret(int fd, const std::string& name, bool one_line) {
    forbid_core_dumps();
    Secret buffer(first_piece);
    std::size_t length = 0;
    while (length <= max_key_bytes) {
        if (length == buffer.bytes().size()) {
            Secret larger(2 * length);
            std::ranges::copy(buffer.bytes(), larger.bytes().begin());
            buffer = std::move(larger);
        }
        const auto got = ::read(fd, buffer.bytes().data() + length, one_line ? 1 : buffer.bytes().size() - length);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return system_error(name);
        if (got == 0 || (one_line && buffer.bytes()[length] == std::byte{'\n'})) break;
        length += static_cast<std::size_t>(got);
    }
    if (length > max_key_bytes) return refuse(name, fmt::format("the key has more than {} bytes", max_key_bytes));
    return Secret(std::as_const(buffer).bytes().first(length));
}

Result<Secret> read_key_file(const std::string& path) {
    if (path == "-") return read_secret(STDIN_FILENO, "standard input", true);
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) return system_error(path);
    return read_secret(file.get(), path, false);
}

/// Undoes base64 (RFC 4648), with line ends anywhere.
Result<Secret> decoded(const Secret& text, const std::string& name) {
    constexpr std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    Secret bytes(text.bytes().size());
    std::size_t length = 0;
    unsigned bits = 0;
    unsigned count = 0;
    std::size_t characters = 0;
    std::size_t padding = 0;
    for (const auto byte : text.bytes()) {
        const char c = static_cast<char>(byte);
        if (c == '\n' || c == '\r') continue;
        ++characters;
        padding += c == '=' ? 1 : 0;
        if (c == '=') continue;
        const auto digit = alphabet.find(c);
        if (digit == std::string_view::npos || padding > 0) return refuse(name, "it is not base64");
        bits = (bits << 6 | static_cast<unsigned>(digit)) & 0xfff;
        count += 6;
        if (count < 8) continue;
        count -= 8;
        bytes.bytes()[length++] = static_cast<std::byte>(bits >> count);
    }
    if (characters % 4 != 0 || padding > 2) return refuse(name, "it is not base64: characters are missing at its end");
    return Secret(std::as_const(bytes).bytes().first(length));
}

constexpr std::string_view data_part = "data=";

/// Where the part of a list ends that begins at `begin`: at a comma that is not written twice.
std::size_t end_of_part(std::string_view text, std::size_t begin) {
    auto at = text.find(',', begin);
    while (at < text.size() && text.substr(at + 1).starts_with(',')) at = text.find(',', at + 2);
    return std::min(at, text.size());
}

/// A number stands for data: see take_arguments. What is wrong may be a part of a secret: errors do not show it.
Result<std::map<std::string, std::string>> parse_object(const std::string& text) {
    std::map<std::string, std::string> values;
    const auto parts = parts_of(text);
    if (parts.front() != "secret")
        return refuse("--object", R"(it does not begin with "secret,"; no other objects are known here)");
    for (const auto& part : std::span(parts).subspan(1)) {
        const auto equals = std::min(part.find('='), part.size());
        const auto name = part.substr(0, equals);
        if (name != "id" && name != "file" && name != "data" && name != "format") {
            return refuse("--object secret",
                          "it has a part that is none of id=, file=, data= and format=; a comma in a value is written "
                          "twice");
        }
        values[name] = part.substr(std::min(equals + 1, part.size()));
    }
    if (values["id"].empty()) return refuse("--object secret", "its id is missing");
    return values;
}

/// The value of data=, in which a comma is written twice.
Secret data_of(const std::string& number) {
    const auto& written = std::as_const(arguments().data.at(std::stoul(number))).bytes();
    Secret value(written.size());
    std::size_t length = 0;
    for (std::size_t i = 0; i < written.size(); ++i) {
        value.bytes()[length++] = written[i];
        if (written[i] == std::byte{','}) ++i;
    }
    return Secret(std::as_const(value).bytes().first(length));
}

using Object = std::map<std::string, std::string>;

Result<std::vector<Object>> parse_objects() {
    std::vector<Object> objects;
    std::set<std::string> ids;
    for (const auto& text : arguments().objects) {
        objects.push_back(QCOW_TRY(parse_object(text)));
        const auto& id = objects.back().at("id");
        if (!ids.insert(id).second) return refuse(fmt::format("--object secret \"{}\"", id), "this id is given twice");
    }
    return objects;
}

Result<Secret> secret_of(const Object& object) {
    const auto name = fmt::format("--object secret \"{}\"", object.at("id"));
    forbid_core_dumps();
    const bool has_file = object.contains("file");
    if (has_file == object.contains("data")) return refuse(name, "give it either a file or data");
    const auto format = object.contains("format") ? object.at("format") : "raw";
    if (format != "raw" && format != "base64") return refuse(name, "its format is neither raw nor base64");
    auto value = has_file ? QCOW_TRY(read_key_file(object.at("file"))) : data_of(object.at("data"));
    return format == "raw" ? Result<Secret>(std::move(value)) : decoded(value, name);
}

/// Nothing if no object defines it.
Result<std::optional<Secret>> defined_secret(const std::string& id) {
    for (const auto& object : QCOW_TRY(parse_objects())) {
        if (object.at("id") == id) return QCOW_TRY(secret_of(object));
    }
    return std::nullopt;
}

Result<Secret> find_secret(const std::string& id) {
    if (auto secret = QCOW_TRY(defined_secret(id))) return *std::move(secret);
    return refuse(fmt::format("secret \"{}\"", id), fmt::format("define it with --object secret,id={},file=FILE", id));
}

/// Asks on the terminal, which does not show what is typed.
Result<std::optional<Secret>> ask(const std::string& question) {
    const Descriptor terminal(::open("/dev/tty", O_RDWR | O_CLOEXEC));
    const auto put = [&](const std::string& text) {
        static_cast<void>(!::write(terminal.get(), text.data(), text.size()));
    };
    std::optional<Result<Secret>> typed;
    {
        const SilentTerminal silent(terminal.get());
        if (!silent.works()) return std::nullopt;
        put(question);
        typed = read_secret(terminal.get(), "terminal", true);
    }
    put("\n");
    if (!*typed) return std::unexpected(std::move(*typed).error());
    return **std::move(typed);
}

std::unexpected<qcow::Error> no_way_to_ask(const std::string& file) {
    return std::unexpected(qcow::Error{Errc::encrypted, file,
                                       "it is encrypted, and there is no terminal to ask for its key; --key FILE or "
                                       "--object secret,id=ID,file=FILE gives it"});
}

/// Reads it the first time.
Result<Secret> key_of(GivenKey& given) {
    if (!given.key) {
        given.key = given.file.empty()
                        ? QCOW_TRY(read_secret(given.descriptor, fmt::format("--key-fd {}", given.descriptor), false))
                        : QCOW_TRY(read_key_file(given.file));
    }
    return Secret(std::as_const(*given.key).bytes());
}

/// Which one of several keys is meant.
enum class Turn : std::uint8_t { next, last };

/// The only secret that no option names, if there is one.
Result<std::optional<Secret>> only_secret(const std::string& file, Turn turn) {
    std::optional<Object> only;
    for (auto& object : QCOW_TRY(parse_objects())) {
        if (arguments().named.contains(object.at("id"))) continue;
        if (only) {
            return refuse(file, fmt::format("there are several secrets, and nothing says which is its key; give {}",
                                            turn == Turn::last ? "its ID with -o encrypt.key-secret=ID"
                                                               : "the key with --key FILE in place of a secret"));
        }
        only = std::move(object);
    }
    if (!only) return std::nullopt;
    return QCOW_TRY(secret_of(*only));
}

/// The key that options give, if they give one.
Result<std::optional<Secret>> given_key(const std::string& file, Turn turn) {
    auto& all = arguments();
    if (all.keys.empty()) return only_secret(file, turn);
    const auto last = all.keys.size() - 1;
    const auto index = turn == Turn::last ? last : std::min(all.taken++, last);
    auto& given = all.keys[index];
    if (turn == Turn::next && given.is_new && last > 0) {
        return refuse(
            file,
            "no key is left for it: the last --key is that of the new image; before it, give a --key for each "
            "encrypted image and layer");
    }
    // Those before it take the first lines of standard input.
    for (std::size_t i = 0; i < index; ++i) {
        if (all.keys[i].file == "-") QCOW_TRY(key_of(all.keys[i]));
    }
    given.used = true;
    given.is_new |= turn == Turn::last;
    return QCOW_TRY(key_of(given));
}

/// `layer`: what --image-opts says of it.
Result<Secret> find_key(const qcow::KeyRequest& request, const LayerKey& layer) {
    if (!layer.method.empty() && layer.method != request.method) {
        return refuse(request.file, fmt::format("its header says that its encryption is {}, and encrypt.format={} says "
                                                "something else",
                                                request.method, layer.method));
    }
    // A job may open the layer again, at another depth of another chain.
    auto& known = arguments().known;
    if (!layer.secret.empty()) {
        auto secret = QCOW_TRY(find_secret(layer.secret));
        known.insert_or_assign(request.file, Secret(std::as_const(secret).bytes()));
        return secret;
    }
    if (!request.secret.empty()) {
        if (auto secret = QCOW_TRY(defined_secret(request.secret))) return *std::move(secret);
    }
    if (const auto found = known.find(request.file); found != known.end())
        return Secret(std::as_const(found->second).bytes());
    auto key = QCOW_TRY(given_key(request.file, Turn::next));
    if (!key) key = QCOW_TRY(ask(fmt::format("Key of {}: ", qcow::printable(request.file))));
    if (!key) return no_way_to_ask(request.file);
    known.insert_or_assign(request.file, Secret(std::as_const(*key).bytes()));
    return *std::move(key);
}

}  // namespace

void add_key_options(CLI::App& app) {
    auto& all = arguments();
    app.add_option("--object", all.objects,
                   "Define a secret: secret,id=ID,file=FILE or data=TEXT, and format=raw or base64. It is the key of\n"
                   "images whose options or names have its ID; of all, if it is the only one that -o does not name")
        ->type_name("SECRET")
        ->allow_extra_args(false);
    // In the order of the command line, of both options together.
    app.add_option_function<std::string>(
           "--key", [](const std::string& file) { arguments().keys.push_back({file, -1, {}}); },
           "Take the key of an encrypted image from this file, as it is, or from a line of standard input\n"
           "(-). Repeated: of the next encrypted image or layer; the last one is that of a new image alone\n"
           "(default: ask on the terminal)")
        ->type_name("FILE")
        ->allow_extra_args(false)
        ->trigger_on_parse()
        ->check(name_text);
    app.add_option_function<int>(
           "--key-fd", [](int fd) { arguments().keys.push_back({{}, fd, {}}); },
           "Take the key from this file descriptor, up to its end; else as --key")
        ->type_name("NUMBER")
        ->allow_extra_args(false)
        ->trigger_on_parse()
        ->check(whole_number(0, 1 << 20));
}

qcow::KeySource key_source(std::vector<LayerKey> layers, std::string image) {
    return [layers = std::move(layers), image = std::move(image)](const qcow::KeyRequest& request) {
        const bool named = request.image == image && request.depth < layers.size();
        return find_key(request, named ? layers[request.depth] : LayerKey{});
    };
}

Result<std::shared_ptr<const Secret>> secret_of(const std::string& id) {
    arguments().named.insert(id);
    return std::make_shared<const Secret>(QCOW_TRY(find_secret(id)));
}

Result<std::shared_ptr<const Secret>> new_secret_of(const std::string& id) {
    auto secret = QCOW_TRY(secret_of(id));
    if (secret->bytes().empty()) return refuse(fmt::format("secret \"{}\"", id), no_key);
    return secret;
}

Result<std::shared_ptr<const Secret>> new_key(const std::string& path) {
    auto key = QCOW_TRY(given_key(path, Turn::last));
    if (!key) {
        const auto name = qcow::printable(path);
        key = QCOW_TRY(ask(fmt::format("New key of {}: ", name)));
        if (!key) return no_way_to_ask(path);
        const auto again = QCOW_TRY(ask(fmt::format("The same key again: ")));
        if (!again || !std::ranges::equal(again->bytes(), std::as_const(*key).bytes()))
            return refuse(path, "the two keys differ");
    }
    if (std::as_const(*key).bytes().empty()) return refuse(path, no_key);
    return std::make_shared<const Secret>(*std::move(key));
}

bool keys_are_given() { return !arguments().keys.empty(); }

qcow::Result<void> verify_keys_are_needed(const qcow::NewImage& image) {
    if (image.options.encryption || std::ranges::count(arguments().keys, false, &GivenKey::used) == 0) return {};
    const auto* const remedy = image.format == qcow::Format::raw
                                   ? "a raw image is not encrypted; make it luks, or qcow2 with"
                                   : "the new image is not encrypted without";
    return refuse(image.path,
                  fmt::format("--key or --key-fd gives a key that nothing needs: {} -o encrypt.format=luks", remedy));
}

void warn_of_iter_time(std::uint32_t iter_time_ms) {
    if (iter_time_ms / 1000.0 < qcow::default_kdf_seconds) return;
    complain(
        fmt::format("warning: encrypt.iter-time={}: commands refuse the image without --max-kdf-seconds, which is "
                    "{:.0f} by default",
                    iter_time_ms, qcow::default_kdf_seconds));
}

void warn_of_unused_keys() {
    const auto& keys = arguments().keys;
    const auto used = std::ranges::count(keys, true, &GivenKey::used);
    if (static_cast<std::size_t>(used) == keys.size()) return;
    if (used == 0) return complain("warning: no key (--key, --key-fd) was needed");
    complain(fmt::format("warning: of the {} keys (--key, --key-fd), only {} {} needed", keys.size(), used,
                         used == 1 ? "was" : "were"));
}

void forget_keys() { arguments() = {}; }

std::vector<std::string> take_arguments(int argc, char** argv) {
    std::vector<std::string> taken;
    for (int i = 1; i < argc; ++i) {
        const std::string_view text = argv[i];
        const bool is_object = text.starts_with("--object=") || (i > 1 && std::string_view(argv[i - 1]) == "--object");
        auto& all = taken.emplace_back(is_object ? "" : text);
        std::size_t hidden = text.size();  // to the end: a person may have forgotten to write a comma twice
        for (std::size_t begin = 0; is_object && begin < text.size();) {
            const auto end = end_of_part(text, begin);
            const auto part = text.substr(begin, end - begin);
            if (part.starts_with(data_part)) {
                const auto value = part.substr(data_part.size());
                all += fmt::format("{}{}", data_part, arguments().data.size());
                forbid_core_dumps();
                arguments().data.emplace_back(std::as_bytes(std::span(value)));
                hidden = std::min(hidden, begin + data_part.size());
            } else {
                all += part;
            }
            if (end < text.size()) all += ',';
            begin = end + 1;
        }
        std::memset(argv[i] + hidden, '*', text.size() - hidden);
    }
    return taken;
}

}  // namespace tool
