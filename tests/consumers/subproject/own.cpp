int main() {
#ifdef NDEBUG
  return 3;
#else
  return 0;
#endif
}
