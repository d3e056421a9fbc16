#include "support/named_files.h"

namespace qcow::test {

NamedFiles::NamedFiles() {
    namespace fs = std::filesystem;
    fs::create_directories(images() / "sub");
    reset();
    fs::create_symlink("base", images() / "link");
    fs::create_symlink("sub", images() / "linked-sub");
    fs::create_symlink("../outside", images() / "link-out");
    fs::create_symlink(outside(), images() / "absolute-link-out");
    fs::create_symlink(images() / "base", images() / "absolute-link-in");
    fs::create_symlink("..", images() / "linked-parent");
    fs::create_symlink("/dev/null", images() / "linked-null");
    fs::create_symlink("/proc/self/root" + outside().string(), images() / "magic-link-out");
    if (mkfifo((images() / "fifo").c_str(), 0600) != 0) throw std::runtime_error("cannot make a FIFO");
    const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    (images() / "socket").string().copy(address.sun_path, sizeof address.sun_path - 1);
    if (bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
        throw std::runtime_error("cannot make a socket");
    close(listener);
    // A file system may not have devices, and only root makes them.
    has_device_ = mknod((images() / "null").c_str(), S_IFCHR | 0600, makedev(1, 3)) == 0;
}

void NamedFiles::reset() const {
    put_file(outside(), std::string(named_size, 'o'));
    put_file(images() / "base", std::string(named_size, 'b'));
    put_file(images() / "sub" / "base", std::string(named_size, 's'));
}

std::vector<NamedFile> NamedFiles::all() const {
    using enum Granted;
    const auto inside = (images() / "base").string();
    std::vector<NamedFile> files = {
        {"base"},
        {"./base"},
        {"sub/base"},
        {"sub/../base"},
        {"linked-sub/../base"},
        {"link"},
        {"linked-sub/base"},
        {"file:base"},
        {"../outside", yes, leads_out},
        {"file:../outside", yes, leads_out},
        {"sub/../../outside", yes, leads_out},
        {"../images/base", yes, leads_out},
        {"link-out", yes, leads_out},
        {"absolute-link-out", yes, leads_out},
        {"absolute-link-in", yes, leads_out},
        {"magic-link-out", yes, leads_out},
        {"linked-parent/outside", yes, leads_out},
        {outside().string(), yes, absolute},
        {"file:" + outside().string(), yes, absolute},
        {"//" + outside().string(), yes, absolute},
        {inside, yes, absolute},
        {R"(json:{"driver":"raw","file":{"driver":"file","filename":"base"}})", yes, described},
        {fmt::format(R"(json:{{"driver":"raw","file.filename":"{}"}})", outside().string()), yes, described},
        {"nbd:localhost:10809", scheme, scheme},
        {"nbd+unix:///?socket=socket", scheme, scheme},
        {"https://localhost/base", scheme, scheme},
        {"fifo", no_regular_file, no_regular_file},
        {"socket", no_regular_file, no_regular_file},
        {"sub", no_regular_file, no_regular_file},
        {".", no_regular_file, no_regular_file},
        {"..", no_regular_file, leads_out},
        {"linked-null", no_regular_file, leads_out},
        {"/dev/null", no_regular_file, absolute},
        {"/dev/zero", no_regular_file, absolute},
        {"missing", missing, missing},
        {"base/base", missing, missing},
    };
    if (has_device_) files.push_back({"null", no_regular_file, no_regular_file});
    return files;
}

std::string NamedFiles::make_image(const std::string& file, FileReference::Role role, const std::string& name,
                                   const std::string& format) const {
    const bool backing = role == FileReference::Role::backing_file;
    CreateOptions options;
    options.size = named_size;
    options.backing_name = backing ? name : "";
    options.backing_format = backing ? format : "";
    options.data_file_name = backing ? "" : name;
    const auto storage = memory_storage();
    value_of(create_image({storage, backing ? nullptr : memory_storage()}, options));
    std::string bytes(value_of(storage->size()), '\0');
    value_of(storage->read({0}, std::as_writable_bytes(std::span(bytes))));
    const auto path = (images() / file).string();
    put_file(path, bytes);
    return path;
}

}  // namespace qcow::test
